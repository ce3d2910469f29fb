"""GPT-2 exactly as published, and by flags its modern variants: RoPE, RMSNorm, SwiGLU, relu^2, qk-norm. Self-contained.

References: Radford et al. 2019 (GPT-2); https://github.com/openai/gpt-2/blob/master/src/model.py; RoPE: Su et al. 2021,
arXiv 2104.09864; RMSNorm: Zhang & Sennrich 2019, 1910.07467; SwiGLU: Shazeer 2020, 2002.05202; relu^2: So et al. 2021,
2109.08668; qk-norm: Dehghani et al. 2023, 2302.05442.

Shapes, everywhere in this file:
    B  sequences in the batch      C   n_embd, width of the residual stream      nh  n_head
    T  positions in a sequence     V   vocab_size                                hs  C / nh, width of one head
"""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

LOSS_CHUNKS = 16  # parts of a micro-batch whose logits exist one at a time with chunked_loss


@dataclass(frozen=True)
class GPTConfig:
    """The architecture. The defaults are GPT-2 124M as published."""

    block_size: int = 1024  # longest context, in tokens
    vocab_size: int = 50257  # rows of the embedding; on GPUs 50304 = 128 x 393 saves padding the logits in every step
    n_layer: int = 12  # transformer blocks
    n_head: int = 12  # attention heads
    n_embd: int = 768  # width of the residual stream
    dropout: float = 0.0  # probability; 0 for pretraining, 0.1 or more for small data
    bias: bool = True  # biases in linear layers and LayerNorm
    qkv_bias: bool | None = None  # biases of q, k and v; None: as bias
    tie_weights: bool = True  # the output head is the token embedding
    pos: Literal["learned", "rope"] = "learned"  # positions: a table added to the embedding, or rotated q and k
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    mlp: Literal["gelu", "swiglu", "relu2"] = "gelu"
    mlp_hidden: int | None = None  # width inside the MLP; None: 4 C, SwiGLU 8/3 C rounded up to a multiple of 64
    norm_eps: float = 1e-5  # added to the variance in every norm
    rope_base: float = 10000.0  # RoPE's longest wavelength is 2 pi times this, in tokens
    rope_fraction: float = 1.0  # part of each head's dimensions that RoPE rotates; the others carry no position
    qk_norm: bool = False  # RMS-normalise q and k per head, before RoPE
    attn_scale: float | None = None  # of q k before the softmax; None: 1 / sqrt(hs)
    head_gate: int = 0  # gates each head's result by this many dimensions of attention's input; 0: none
    embed_norm: bool = False  # one more norm, behind the embedding
    value_embeds: int = 0  # embeddings added to v: this many tables, for the first blocks and once more for the last
    head_bias: bool = False  # of the output head
    logit_softcap: float | None = None  # no logit exceeds this; None: no limit
    init: Literal["gpt2", "zero"] = "gpt2"  # zero: the head and what ends a branch start at 0, the embedding at N(0, 1)

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}, but it must be at least 1")
        for name in ("mlp_hidden", "norm_eps", "rope_base", "attn_scale", "logit_softcap"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name} = {getattr(self, name)}, but it must be more than 0")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd = {self.n_embd} is not a multiple of n_head = {self.n_head}")
        if self.pos == "rope" and self.n_embd // self.n_head % 2:
            raise ValueError(f"pos = 'rope' needs even heads; n_embd / n_head = {self.n_embd // self.n_head} is odd")
        if not 0 <= self.value_embeds <= self.n_layer:
            raise ValueError(f"value_embeds = {self.value_embeds}, but it must be between 0 and n_layer")
        if not 0 <= self.head_gate <= self.n_embd:
            raise ValueError(f"head_gate = {self.head_gate}, but it must be between 0 and n_embd")
        if not 0.0 < self.rope_fraction <= 1.0:
            raise ValueError(f"rope_fraction = {self.rope_fraction}, but it must be in (0, 1]")
        if self.init == "zero" and self.tie_weights:
            raise ValueError("init = 'zero' needs a head of its own: tie_weights = False")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout = {self.dropout}, but it must be in [0, 1)")


class KVCache:
    """Keys and values of the positions a model has seen, so that a new token costs one position of work.

    Holds up to `max_len` positions of `batch_size` sequences; `GPT.forward(idx, cache=cache)` appends idx's.
    """

    def __init__(self, config: GPTConfig, batch_size: int, max_len: int, device=None, dtype=None):
        hs = config.n_embd // config.n_head
        shape = (config.n_layer, batch_size, config.n_head, max_len, hs)
        self.k = torch.empty(shape, device=device, dtype=dtype)
        self.v = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0  # positions held

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, nh, T, hs) keys and values of new positions; all of that layer so far, (B, nh, length + T, hs)."""
        end = self.length + k.size(2)
        self.k[layer, :, :, self.length : end] = k
        self.v[layer, :, :, self.length : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]


class GPT(nn.Module):
    """A decoder-only transformer. `GPT(config)(idx)` gives logits, `GPT(config)(idx, targets)` the mean loss."""

    activation_checkpointing = False  # keep only each block's input, and compute the rest again in the backward pass
    chunked_loss = False  # never hold the logits of all positions

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        if config.pos == "learned":
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.ln_e = make_norm(config) if config.embed_norm else nn.Identity()
        self.vte = nn.ModuleList(nn.Embedding(config.vocab_size, config.n_embd) for _ in range(config.value_embeds))
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = make_norm(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=config.head_bias)
        self.apply(self._init_weights)
        if config.tie_weights:
            self.lm_head.weight = self.wte.weight

    def _init_weights(self, module: nn.Module) -> None:
        """gpt2: N(0, 0.02), but both projections back into the residual stream N(0, 0.02 / sqrt(2 L)). zero: matrices
        as torch's nn.Linear, U(+-1 / sqrt(fan_in)) by its variance. Biases are 0."""
        zero = self.config.init == "zero"
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=1.0 if zero else 0.02)
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=math.sqrt(1 / (3 * module.in_features)) if zero else 0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if isinstance(module, Block):  # apply() visits children first, so this overrides what they drew
            for proj in (module.attn.c_proj, module.mlp.c_proj):
                nn.init.normal_(proj.weight, std=0.0 if zero else 0.02 / math.sqrt(2 * self.config.n_layer))
        if module is self and zero:
            nn.init.zeros_(self.lm_head.weight)

    def hidden(
        self, idx: Tensor, cache: KVCache | None = None, positions: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Token ids (B, T) -> final hidden states (B, T, C), for callers that want logits at a few positions only.

        A row may hold several sequences, or a tree of them: positions (B, T) then says where in its own sequence each
        token stands, and mask (B, 1, T, T) is true where a token (its row) may attend to another (its column).
        """
        T = idx.size(1)
        if positions is None:
            past = cache.length if cache is not None else 0
            end = past + T
            assert end <= self.config.block_size, f"{end} positions, but block_size is {self.config.block_size}"
            positions = torch.arange(past, end, device=idx.device)
            if past and T > 1:  # several new positions behind a past: causal, but not square
                mask = torch.ones(T, end, dtype=torch.bool, device=idx.device).tril(past)
        x = self.ln_e(self.wte(idx))  # (B, T, C)
        if self.config.pos == "learned":
            x = x + self.wpe(positions)
            rotation = None
        elif self.config.pos == "rope":
            rotation = rope_rotation(positions.unsqueeze(-1), self.config)  # of (T, 1) or (B, T, 1): heads share it
        else:
            raise NotImplementedError(f"pos = {self.config.pos!r}")
        if torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") == torch.bfloat16:
            x = x.bfloat16()  # and with it the whole residual stream: on GPUs half of its traffic is saved
        x = self.drop(x)
        for layer, block in enumerate(self.h):
            values = self.value_embeddings(layer, idx)
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, values, rotation, mask, cache, use_reentrant=False)
            else:
                x = block(x, values, rotation, mask, cache)
        if cache is not None:
            cache.length += T
        return self.ln_f(x)

    def value_embeddings(self, layer: int, idx: Tensor) -> Tensor | None:
        """What this block adds to v, (B, T, C): Zhou et al. 2024, arXiv 2410.17897, as the speed runs simplified it."""
        tables, first_of_last = len(self.vte), self.config.n_layer - len(self.vte)
        if layer < tables:
            return self.vte[layer](idx)
        return self.vte[layer - first_of_last](idx) if layer >= first_of_last else None

    def forward(self, idx: Tensor, targets: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Token ids (B, T) -> logits (B, T, V); with targets (B, T) the mean cross entropy in nats, -1 left out.

        With a cache, idx are the next T tokens of sequences whose past the cache holds.
        """
        x = self.hidden(idx, cache)  # (B, T, C)
        if targets is not None and self.chunked_loss:
            return self.loss_in_chunks(x.flatten(0, 1), targets.flatten())
        if targets is not None:
            return self.loss(x.flatten(0, 1), targets.flatten(), "mean")
        return self.logits(x)  # (B, T, V)

    def compile(self, **options) -> None:
        """As nn.Module.compile, but a chunk of the loss is a graph of its own: in one graph the compiler would fuse all
        chunks, and hold their logits at once."""
        super().compile(**options)
        if self.chunked_loss:
            self.loss = torch.compile(self.loss, **options)
            self.loss_in_chunks = torch.compiler.disable(self.loss_in_chunks)

    def loss_in_chunks(self, x: Tensor, targets: Tensor) -> Tensor:
        """As loss(..., "mean"), each chunk's logits computed once more in the backward pass."""
        chunks = zip(x.chunk(LOSS_CHUNKS), targets.chunk(LOSS_CHUNKS), strict=True)
        sums = [checkpoint(self.loss, *chunk, "sum", use_reentrant=False) for chunk in chunks]
        return torch.stack(sums).sum() / (targets >= 0).sum()

    def loss(self, x: Tensor, targets: Tensor, reduction: str) -> Tensor:
        """Hidden states (N, C) and targets (N,) -> cross entropy in nats, -1 left out."""
        return F.cross_entropy(self.logits(x), targets, ignore_index=-1, reduction=reduction)

    def logits(self, x: Tensor) -> Tensor:
        """Hidden states (..., C) -> logits (..., V), in float32."""
        z = self.lm_head(x).float()
        if self.config.logit_softcap is not None:  # smooth, and close to z where z is small
            z = z * (1 + (z / self.config.logit_softcap).square()).rsqrt()
        return z

    def num_params(self) -> int:
        """Number of parameters, tied ones counted once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, seq_len: int) -> int:
        """FLOPs of a forward and backward pass per token: 6 N + 12 L C T (Chowdhery et al. 2022, PaLM, appendix B).

        N are the parameters that multiply: without wpe and vte, and without wte where the head has its own weights.
        """
        n = self.num_params()
        if self.config.pos == "learned":
            n -= self.wpe.weight.numel()
        if not self.config.tie_weights:
            n -= self.wte.weight.numel()
        n -= sum(table.weight.numel() for table in self.vte)
        return 6 * n + 12 * self.config.n_layer * self.config.n_embd * seq_len


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, values: Tensor | None, rotation: tuple[Tensor, Tensor] | None, mask: Tensor | None,
        cache: KVCache | None,
    ) -> Tensor:  # fmt: skip
        x = x + self.attn(self.ln_1(x), values, rotation, mask, cache)
        return x + self.mlp(self.ln_2(x))


class CausalSelfAttention(nn.Module):
    """q, k and v are matrices of their own: an optimizer that orthogonalises must not see them as one."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        C, qkv_bias = config.n_embd, config.bias if config.qkv_bias is None else config.qkv_bias
        self.layer = layer
        self.n_head = config.n_head
        self.qk_norm = config.qk_norm
        self.scale = config.attn_scale
        self.head_gate = config.head_gate
        self.dropout = config.dropout
        self.c_q = nn.Linear(C, C, bias=qkv_bias)
        self.c_k = nn.Linear(C, C, bias=qkv_bias)
        self.c_v = nn.Linear(C, C, bias=qkv_bias)
        self.c_proj = nn.Linear(C, C, bias=config.bias)
        if config.head_gate:
            self.gate = nn.Linear(config.head_gate, config.n_head, bias=False)
        if config.value_embeds > min(layer, config.n_layer - 1 - layer):
            self.value_gain = nn.Parameter(torch.full((config.n_head,), 0.5))
        self.resid_drop = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, values: Tensor | None, rotation: tuple[Tensor, Tensor] | None, mask: Tensor | None,
        cache: KVCache | None,
    ) -> Tensor:  # fmt: skip
        B, T, C = x.shape
        projections = (self.c_q, self.c_k, self.c_v)
        one = self.training and x.is_cuda  # while decoding, putting them together would cost more than the product
        projected = one_product(projections, x) if one else [proj(x) for proj in projections]
        q, k, v = (y.view(B, T, self.n_head, C // self.n_head) for y in projected)
        if values is not None:
            v = v + (self.value_gain[:, None] * values.view_as(v)).to(v.dtype)
        if self.qk_norm:
            q, k = F.rms_norm(q, (q.size(-1),)), F.rms_norm(k, (k.size(-1),))
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # (B, nh, T, hs)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        p = self.dropout if self.training else 0.0
        causal = mask is None and k.size(2) == T  # a single new position sees all of the past
        if causal and not p and 1 < T <= 256 and q.dtype == torch.bfloat16 and x.device.type == "cpu":
            y = causal_attention(q, k, v, self.scale)
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, p, causal, scale=self.scale)  # (B, nh, T, hs)
        y = y.transpose(1, 2)  # (B, T, nh, hs)
        if self.head_gate:  # Qiu et al. 2025, arXiv 2505.06708; from a few dimensions, as in speed runs
            y = y * (2 * self.gate(x[..., : self.head_gate]).sigmoid()).unsqueeze(-1)
        y = y.reshape(B, T, C)
        return self.resid_drop(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        C, self.kind = config.n_embd, config.mlp
        hidden = config.mlp_hidden or (64 * math.ceil(8 * C / 3 / 64) if self.kind == "swiglu" else 4 * C)
        self.c_fc = nn.Linear(C, hidden, bias=config.bias)
        if self.kind == "swiglu":
            self.c_gate = nn.Linear(C, hidden, bias=config.bias)
        self.c_proj = nn.Linear(hidden, C, bias=config.bias)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "swiglu":
            x = F.silu(self.c_gate(x)) * self.c_fc(x)
        elif self.kind == "relu2":
            x = F.relu(self.c_fc(x)).square()
        elif self.kind == "gelu":
            x = F.gelu(self.c_fc(x), approximate="tanh")  # GPT-2's own form
        else:
            raise NotImplementedError(f"mlp = {self.kind!r}")
        return self.drop(self.c_proj(x))


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale) of (B, nh, T, hs). Torch's own converts
    bfloat16 tile by tile on a CPU: a short context is 1.2 (T = 256) to 3 times (T = 64) as fast by plain products."""
    future = torch.ones(q.size(2), q.size(2), dtype=torch.bool, device=q.device).triu(1)
    scores = q * (scale or 1 / math.sqrt(q.size(-1))) @ k.transpose(2, 3)  # (B, nh, T, T)
    return scores.masked_fill(future, -math.inf).softmax(dim=-1) @ v


def without_cudnn() -> contextlib.AbstractContextManager:
    """Attention by other kernels than cuDNN's, which makes a plan for every new shape: tens of ms or more."""
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def make_norm(config: GPTConfig) -> nn.Module:
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.n_embd, eps=config.norm_eps)
    if config.norm == "layernorm":
        return nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)
    raise NotImplementedError(f"norm = {config.norm!r}")


def one_product(projections: Sequence[nn.Linear], x: Tensor) -> tuple[Tensor, ...]:
    """proj(x) of each, in one matrix product: faster on GPUs, and the same up to rounding."""
    biases = [proj.bias for proj in projections if proj.bias is not None]
    y = F.linear(x, torch.cat([proj.weight for proj in projections]), torch.cat(biases) if biases else None)
    return y.chunk(len(projections), dim=-1)


def rope_rotation(positions: Tensor, config: GPTConfig) -> tuple[Tensor, Tensor]:
    """Positions (..., T) -> cosine and sine of every rotated pair's angle, (..., T, pairs) each, always in float32."""
    pairs = round(config.rope_fraction * config.n_embd / config.n_head / 2)
    freq = config.rope_base ** (-torch.arange(pairs, device=positions.device, dtype=torch.float32) / pairs)
    angle = positions[..., None] * freq
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + pairs) of x (B, T, nh, hs), the "rotate half" layout of Llama's checkpoints, and of
    GPT-NeoX's where dimensions are left over."""
    pairs = cos.size(-1)
    a, b, rest = x.float().split([pairs, pairs, x.size(-1) - 2 * pairs], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1).to(x.dtype)
