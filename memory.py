"""What a training step holds in memory, from shapes alone: nothing of the model's size is allocated.

The most is held in one of three moments: at the loss, with all that the backward pass will need and the logits; in the
backward pass of a block; or in the optimizer's step. All numbers are bytes on one process. The tables say what torch
2.13 keeps, eager or compiled; records/2026-11-21_memory_foreseen compares them with what was measured.
"""

from dataclasses import dataclass
from functools import cache

import torch

from model import GPT, LOSS_CHUNKS, GPTConfig
from optim import is_hidden

RUNTIME = {"cuda": 2 * 2**25, "cpu": 390_000_000}  # cuBLAS's workspaces (of Hopper); Python and torch


@dataclass(frozen=True)
class Foreseen:
    """Bytes on one process: what is held, and the most at any moment of a step."""

    parameters: int
    gradients: int
    optimizer: int  # its state, and the weights' average
    activations: int  # kept for the backward pass, with what a block's backward pass takes beside them
    logits: int  # and what the loss takes beside them
    update: int  # what the optimizer takes beside its state while it steps
    runtime: int
    total: int  # the most at one moment: less than the sum


@dataclass(frozen=True)
class Setting:
    """How a model is trained, as far as it decides on memory."""

    batch_size: int
    seq_len: int
    optimizer: str = "adamw"
    dtype: torch.dtype = torch.bfloat16
    compiled: bool = True
    device: str = "cuda"
    activation_checkpointing: bool = False
    chunked_loss: bool = False
    accumulates: bool = True  # gradients are there before the backward pass: several micro-batches or processes
    average: bool = False  # keeps the weights' average
    shards: int = 1  # processes among which parameters, gradients and the optimizer's state are divided


def foresee(config: GPTConfig, setting: Setting) -> Foreseen:
    """What one step of this model takes."""
    shapes = parameter_shapes(config)
    count = sum(shape.numel() for shape in shapes.values())
    parameters = gradients = 4 * count // setting.shards
    optimizer = optimizer_state(shapes, setting.optimizer) // setting.shards + parameters * setting.average
    update = update_memory(shapes, setting.optimizer)
    tokens = setting.batch_size * setting.seq_len
    width = setting.dtype.itemsize
    block = tokens * sum(kept_by_block(config, setting).values()) + weight_copies(config, setting)
    around = tokens * sum(kept_around_blocks(config, setting).values())
    kept = around + config.n_layer * block
    if setting.activation_checkpointing:
        kept = around + config.n_layer * tokens * residual_width(setting) * config.n_embd
    wide = 1 if not setting.compiled else 9 if config.pos == "rope" else 3  # compiled, RoPE's gradients are float32
    backward = tokens * width * (hidden_width(config) + wide * config.n_embd)
    again = block if setting.activation_checkpointing else 0  # computed once more in its backward pass
    logits = logits_memory(config, setting)
    runtime = RUNTIME.get(setting.device, 0) + gathered(config, setting)
    fixed, held = parameters + optimizer + runtime, gradients if setting.accumulates else 0
    moments = [
        fixed + held + kept + logits,
        fixed + held + kept - around + again + backward,
        fixed + gradients + block + backward,  # the last block's, where gradients were not there before
        fixed + gradients + update,
    ]
    activations = kept + max(0, again + backward - around)
    return Foreseen(parameters, gradients, optimizer, activations, logits, update, runtime, max(moments))


@cache
def parameter_shapes(config: GPTConfig) -> dict[str, torch.Size]:
    """Of each parameter, tied ones once."""
    with torch.device("meta"):
        return {name: p.shape for name, p in GPT(config).named_parameters()}


def optimizer_state(shapes: dict[str, torch.Size], optimizer: str) -> int:
    """Bytes of the state behind one step."""
    if optimizer == "none":
        return 0
    if optimizer == "adafactor":
        return sum(4 * (1 + (sum(s) if len(s) > 1 else s.numel())) for s in shapes.values())  # rows, columns, a step
    return sum(
        4 * s.numel() if optimizer == "muon" and is_hidden(name, s) else 4 * (2 * s.numel() + 1)
        for name, s in shapes.items()
    )


def update_memory(shapes: dict[str, torch.Size], optimizer: str) -> int:
    """Bytes that a step of the optimizer takes beside its state."""
    if optimizer == "adafactor":
        return 4 * max(s.numel() for s in shapes.values())  # the largest update
    if optimizer == "muon":  # all matrices of a shape at once: momentum, update and its products
        hidden = [s for name, s in shapes.items() if is_hidden(name, s)]
        return max(10 * hidden.count(s) * s.numel() for s in hidden)
    if optimizer == "adamw":
        return 0
    raise NotImplementedError(f"optimizer = {optimizer!r}")


def gathered(config: GPTConfig, setting: Setting) -> int:
    """Bytes put together from shards: all outside of blocks, in float32; of blocks one that computes, the next one, and
    a gradient that leaves."""
    if setting.shards == 1:
        return 0
    counts = {name: shape.numel() for name, shape in parameter_shapes(config).items()}
    block = sum(count for name, count in counts.items() if name.startswith("h.0."))
    return (3 * setting.dtype.itemsize + 4) * block + 4 * (sum(counts.values()) - config.n_layer * block)


def hidden_width(config: GPTConfig) -> int:
    """Of the MLP."""
    return parameter_shapes(config)["h.0.mlp.c_fc.weight"][0]


def residual_width(setting: Setting) -> int:
    """Bytes of an element of the residual stream."""
    return 2 if setting.device == "cuda" and setting.dtype == torch.bfloat16 else 4


def casts(setting: Setting) -> bool:
    """Whether autocast makes copies that autograd keeps; the compiler makes them within its kernels."""
    return setting.dtype.itemsize < 4 and not setting.compiled


def kept_by_block(config: GPTConfig, setting: Setting) -> dict[str, float]:
    """Bytes a token that one block keeps for its backward pass."""
    C, H, w = config.n_embd, hidden_width(config), setting.dtype.itemsize
    cast, on_cuda = casts(setting), setting.device == "cuda"
    norm_input = residual_width(setting) if setting.compiled else 4  # eager norms compute in float32
    rotates = config.pos == "rope"
    kept = {
        "ln_1's input": norm_input * C,
        "c_q, c_k, c_v's input": (3 if cast and not on_cuda else 1) * w * C,
        "q, k, v": 3 * w * C,
        # On CUDA q and k lie in one product with v, which stays; elsewhere the rotated ones take the place of q and k.
        "q, k in their final form": 2 * w * C if config.qk_norm or (rotates and on_cuda) else 0,
        "q, k in float32, for their norms": 8 * C if config.qk_norm and cast else 0,
        "value embeddings, for their gains": 4 * C * min(1, 2 * config.value_embeds / config.n_layer),
        "attention's result": w * C,
        "its gated form, and the gates": w * (C + 2 * config.n_head) if config.head_gate else 0,
        "attention's log of sums": 4 * config.n_head,
        "ln_2's input": norm_input * C,
        "c_fc and c_gate's input": (2 if cast and config.mlp == "swiglu" else 1) * w * C,
        "the MLP": mlp_kept(config, setting) * H,
        "both norms' statistics": 16,
        "the norms' results before their gains": 2 * gain_kept(config, setting),
    }
    if config.dropout:
        mask = 1 if on_cuda else w
        kept["dropout's masks"] = 2 * mask * C
        if not on_cuda:  # no flash attention there: weights, and masks, of every pair of positions
            kept["attention's weights"] = (4 + w + w) * config.n_head * setting.seq_len
    return kept


def gain_kept(config: GPTConfig, setting: Setting) -> int:
    """Bytes a token of what a norm multiplies by its gain: torch's RMSNorm keeps it where it is no single kernel."""
    return 4 * config.n_embd if config.norm == "rmsnorm" and setting.device != "cuda" and not setting.compiled else 0


def mlp_kept(config: GPTConfig, setting: Setting) -> int:
    """Bytes that an MLP keeps of each hidden unit."""
    w = setting.dtype.itemsize
    if config.mlp == "swiglu":  # gate, its SiLU, c_fc's result, the product; compiled code computes SiLU once more
        return (3 if setting.compiled else 4) * w
    if config.mlp == "relu2" and casts(setting):
        return w + 4 + w  # ReLU, in float32 once more, its square
    if config.mlp in ("gelu", "relu2"):
        return 2 * w  # before and behind GELU; ReLU and its square
    raise NotImplementedError(f"mlp = {config.mlp!r}")


def weight_copies(config: GPTConfig, setting: Setting) -> int:
    """Bytes of a block's matrices in the products' dtype, which the backward pass uses again."""
    if setting.shards > 1:  # gathered in that dtype, and once more for the backward pass
        return 0
    matrices = [s for name, s in parameter_shapes(config).items() if is_hidden(name, s)]
    if setting.dtype.itemsize < 4:
        return setting.dtype.itemsize * sum(s.numel() for s in matrices) // config.n_layer
    return 4 * 3 * config.n_embd**2 if setting.device == "cuda" else 0  # c_q, c_k, c_v put together


def kept_around_blocks(config: GPTConfig, setting: Setting) -> dict[str, float]:
    """Bytes a token that the embedding, the last norm and the head keep, without logits."""
    C, on_cuda = config.n_embd, setting.device == "cuda"
    residual = residual_width(setting)
    return {
        "ids and targets": 16,
        "dropout's mask": (1 if on_cuda else 4) * C if config.dropout else 0,
        "ln_f's input": (residual if setting.compiled else 4) * C + gain_kept(config, setting),
        "lm_head's input": (4 if setting.chunked_loss and casts(setting) else setting.dtype.itemsize) * C,
    }


def logits_memory(config: GPTConfig, setting: Setting) -> int:
    """Bytes of the logits and of all that computing the loss and its gradient takes beside them, at most."""
    tokens, V, C, w = setting.batch_size * setting.seq_len, config.vocab_size, config.n_embd, setting.dtype.itemsize
    head_copy = w * V * C if w < 4 else 0
    if not setting.chunked_loss:
        if setting.compiled:
            return w * tokens * V + head_copy + w * V * C  # logits, which become their gradient; the head's gradient
        return 12 * tokens * V + head_copy  # log softmax, and two gradients, in float32
    chunk, head = -(-tokens // LOSS_CHUNKS) * V, 4 * V * C  # the head's gradient so far
    each = max(w * chunk + head, head + w * V * C) if setting.compiled else max(12 * chunk, w * V * C)
    return each + head + 4 * tokens * C  # the hidden states' gradient
