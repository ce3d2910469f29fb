"""The optimizers, torch's own or equal to them, and the learning rate of step s."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from inspect import unwrap
from typing import Literal

import torch
from torch import Tensor, nn

from configurator import at_least
from distributed import copy_like, own_rows

NEWTON_SCHULZ_DTYPE = torch.bfloat16  # torch's
# a, b, c and how many iterations. fast: torch's, singular values end between 0.7 and 1.2; exact: at 1.
NEWTON_SCHULZ = {"fast": ((3.4445, -4.775, 2.0315), 5), "exact": ((2.0, -1.5, 0.5), 12)}
Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class OptimConfig:
    """The update of a step. "Outer" are all parameters but the blocks' matrices: embeddings, head, biases and gains."""

    optimizer: Literal["adamw", "adafactor", "muon"] = "adamw"  # muon: the blocks' matrices; AdamW takes the outer ones
    learning_rate: float = 6e-4  # the highest
    embed_lr: float | None = None  # the embeddings' in its place
    head_lr: float | None = None  # the head's, if it is not tied to the embedding
    vector_lr: float | None = None  # that of biases and gains
    min_lr: float = 6e-5  # the last
    warmup_steps: int | None = None  # steps from 0 to learning_rate; None: a twentieth of all, at most 715
    warmup_fraction: float | None = None  # in place of warmup_steps: this part of all steps
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"  # after the warm-up
    decay_fraction: float = 0.2  # wsd: the part of all steps in which the rate falls
    weight_decay: float = 0.1  # on matrices only
    outer_decay: float | None = None  # on outer parameters; None: weight_decay on their matrices
    beta1: float = 0.9  # AdamW: memory of the gradient
    beta2: float = 0.95  # AdamW: memory of its square
    outer_beta1: float | None = None  # of outer parameters; None: beta1
    outer_beta2: float | None = None  # of outer parameters; None: beta2
    adam_eps: float = 1e-8  # AdamW: added to the root of that square
    muon_size: Literal["rms", "spectral"] = "rms"  # of its steps: as AdamW's, or orthogonal x sqrt(max(1, rows / cols))
    newton_schulz: Literal["fast", "exact"] = "fast"  # Muon: 5 iterations, or 12 that end closer to orthogonal
    even_units: bool = False  # Muon: in a matrix that is not square, updates of one size for all hidden units
    grad_clip: float = 1.0  # longest gradient; 0: no clipping
    average: float = 0.0  # judge and save the weights' average over this part of the steps so far; 0: the last weights

    def __post_init__(self):
        at_least(
            self, 0, "warmup_steps", "learning_rate", "embed_lr", "head_lr", "vector_lr", "min_lr", "weight_decay",
            "outer_decay", "grad_clip",
        )  # fmt: skip
        for name in ("beta1", "beta2", "outer_beta1", "outer_beta2"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}, but it must be in [0, 1)")
        for name in ("decay_fraction", "warmup_fraction", "average"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} = {getattr(self, name)}, but it must be in [0, 1]")
        if self.min_lr > self.learning_rate:
            raise ValueError(f"min_lr = {self.min_lr} is above learning_rate = {self.learning_rate}")
        for name in ("embed_lr", "head_lr", "vector_lr"):
            if getattr(self, name) is not None and (self.optimizer == "adafactor" or not self.learning_rate):
                raise ValueError(f"{name} is a share of learning_rate, and not for optimizer = 'adafactor'")
        if not 0 < self.adam_eps < 1:
            raise ValueError(f"adam_eps = {self.adam_eps}, but it must be in (0, 1)")


def learning_rate(
    step: int, schedule: str, peak: float, low: float, warmup_steps: int, max_steps: int, decay_fraction: float
) -> float:
    """The rate of step 1, 2, ..., max_steps: linear warm-up to `peak`, then towards `low`.

    cosine (Loshchilov & Hutter 2017, arXiv 1608.03983) and linear fall all the way; wsd (warm-up, stable, decay: Hu et
    al. 2024, 2404.06395) stays at the peak and falls linearly over the last decay_fraction of them; constant stays.
    """
    if step <= warmup_steps:
        return peak * step / warmup_steps
    if schedule == "constant":
        return peak
    start = warmup_steps
    if schedule == "wsd":
        start = max(start, max_steps - round(decay_fraction * max_steps))
    progress = min(1.0, max(0, step - 1 - start) / max(1, max_steps - start))
    if schedule == "cosine":
        return low + (peak - low) * 0.5 * (1.0 + math.cos(math.pi * progress))
    if schedule in ("linear", "wsd"):
        return peak + (low - peak) * progress
    raise NotImplementedError(f"schedule = {schedule!r}")


def alone(function: Function, batch: Tensor, rows: int) -> Tensor:
    return function(batch)


def make_optimizers(
    model: nn.Module, config: OptimConfig, spread: Callable[[Function, Tensor, int], Tensor] = alone
) -> list[torch.optim.Optimizer]:
    """The optimizers of a GPT: every parameter is in exactly one group of one of them. A group's "scale" is its share
    of the learning rate. spread is World.spread: it shares the work of muon out among processes."""
    params = sorted(model.named_parameters(), key=lambda named: named[1].dim() < 2)  # matrices first
    hidden = [p for name, p in params if config.optimizer == "muon" and is_hidden(name, p.shape)]
    groups: dict[tuple, dict] = {}
    for name, p in params:
        if config.optimizer != "muon" or not is_hidden(name, p.shape):
            own = group_settings(name, p, config)
            groups.setdefault(tuple(own.values()), {"params": [], **own})["params"].append(p)
    if config.optimizer == "adafactor":
        # As fine-tuners use it: eps[1] makes the step absolute, not relative to the parameter's size (but for gains of
        # an RMS above 1). eps[0] is the floor of a mean squared gradient: its default, 1e-7, is above a GPT-2's, and a
        # matrix's update would lose its scale. An update is clipped to an RMS of 1 (Shazeer & Stern 2018, 1804.04235).
        return [Adafactor(list(groups.values()), lr=config.learning_rate, eps=(1e-15, 1.0))]
    adamw = AdamW(list(groups.values()), lr=config.learning_rate, eps=config.adam_eps, fused=True)
    if config.optimizer == "muon" and hidden:
        return [adamw, Muon([{"params": hidden, "scale": 1.0}], config, spread)]
    if config.optimizer in ("adamw", "muon"):
        return [adamw]
    raise NotImplementedError(f"optimizer = {config.optimizer!r}")


def is_hidden(name: str, shape: torch.Size) -> bool:
    """Whether it is a matrix of a block; all other parameters are outer ones."""
    return name.startswith("h.") and len(shape) == 2


def group_settings(name: str, p: Tensor, config: OptimConfig) -> dict:
    """What AdamW does with this parameter."""
    lr, decay, betas = None, config.weight_decay, (config.beta1, config.beta2)
    if not is_hidden(name, p.shape):
        own = (config.outer_beta1, config.outer_beta2)
        betas = tuple(common if beta is None else beta for beta, common in zip(own, betas, strict=True))
        lr = config.vector_lr if p.dim() < 2 else config.head_lr if name == "lm_head.weight" else config.embed_lr
        decay = config.outer_decay if config.outer_decay is not None else decay * (p.dim() >= 2)
    return dict(scale=1.0 if lr is None else lr / config.learning_rate, weight_decay=decay, betas=betas)


class Average:
    """The average of a model's weights over about `part` of the steps so far. It evens out the noise of a high learning
    rate long before the rate falls. Polynomial decay: Shamir & Zhang 2013, arXiv 1212.1824."""

    def __init__(self, model: nn.Module, part: float, weights: dict[str, Tensor] | None = None):
        """Starts as the model's weights, or as `weights`, the average so far."""
        self.part, self.params = part, dict(model.named_parameters(remove_duplicate=False))
        self.tensors = {p: p.detach().clone() for p in self.params.values()}
        for name, p in self.params.items() if weights else ():
            self.tensors[p] = copy_like(p, weights[name])

    @torch.no_grad()
    def update(self, step: int) -> None:
        weights, averages = ([own_rows(t) for t in tensors] for tensors in (self.tensors, self.tensors.values()))
        torch._foreach_lerp_(averages, weights, min(1.0, 1 / (self.part * step)))

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the model's weights with their average; once more, and every bit is back."""
        for p, average in self.tensors.items():
            weight = own_rows(p).clone()
            own_rows(p).copy_(own_rows(average))
            own_rows(average).copy_(weight)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by the names that the model's state dict has."""
        return {name: self.tensors[p] for name, p in self.params.items()}


class Untraced(torch.optim.Optimizer):
    """torch's own methods without its decorators: those import torch's compiler, a third of the time to the first step,
    to tell it to leave them alone. No optimizer is compiled here."""

    add_param_group = unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = unwrap(torch.optim.Optimizer.load_state_dict)


class AdamW(Untraced, torch.optim.AdamW):
    step = torch.no_grad()(unwrap(torch.optim.AdamW.step))


class Muon(Untraced, torch.optim.Muon):
    """torch's Muon (Jordan et al. 2024) with the matrices of one shape in one batched product, which saves 95% of the
    launches, and with those shared out by `spread`. The state is torch's, and whole on every process.

    A step of size "rms" is as long as AdamW's, so that both share one learning rate (Liu et al. 2025, arXiv
    2502.16982); a "spectral" one is Jordan's own.
    """

    def __init__(self, params: list, config: OptimConfig, spread: Callable = alone):
        coefficients, steps = NEWTON_SCHULZ[config.newton_schulz]
        super().__init__(
            params, lr=config.learning_rate, weight_decay=config.weight_decay,
            ns_coefficients=coefficients, ns_steps=steps,
            adjust_lr_fn={"rms": "match_rms_adamw", "spectral": "original"}[config.muon_size],
        )  # fmt: skip
        self.spread, self.even_units = spread, config.even_units

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                shapes.setdefault(p.shape, []).append(p)
            for (rows, cols), params in shapes.items():
                weights = [own_rows(p) for p in params]
                update = weights[0].new_empty(len(weights), *weights[0].shape, dtype=NEWTON_SCHULZ_DTYPE)
                torch._foreach_copy_(update.unbind(), self.momentum(params, group["momentum"]))
                update = self.spread(partial(self.direction, group), update, rows).float()
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                rms = group["adjust_lr_fn"] == "match_rms_adamw"
                size = 0.2 * math.sqrt(max(rows, cols)) if rms else math.sqrt(max(1, rows / cols))
                torch._foreach_add_(weights, update.unbind(), alpha=-group["lr"] * size)

    def direction(self, group: dict, x: Tensor) -> Tensor:
        """Matrices (n, rows, cols) of gradients -> of updates."""
        x = orthogonalize(x, group)
        return even_out(x) if self.even_units and x.size(-2) != x.size(-1) else x

    def momentum(self, params: list[Tensor], momentum: float) -> tuple[Tensor, ...]:
        """Nesterov's: the running mean of the gradients, and the gradient once more."""
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        grads = [own_rows(p.grad) for p in params]
        means = [own_rows(self.state[p]["momentum_buffer"]) for p in params]
        torch._foreach_lerp_(means, grads, 1 - momentum)
        return torch._foreach_lerp(grads, means, momentum)


def orthogonalize(x: Tensor, group: dict) -> Tensor:
    """The Newton-Schulz iteration of torch's Muon on every matrix of x, (n, rows, cols)."""
    if x.size(-2) > x.size(-1):
        return orthogonalize(x.mT, group).mT.contiguous()
    a, b, c = group["ns_coefficients"]
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=group["eps"])  # the spectral norm is at most 1
    for _ in range(group["ns_steps"]):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def even_out(x: Tensor) -> Tensor:
    """Orthogonal matrices (n, rows, cols) -> all rows, or all columns if those are more, of one length, the sum of
    squares kept. NorMuon (Li et al. 2025, arXiv 2510.05491) without its memory: the same gain here, and no state."""
    short, long = sorted(x.shape[-2:])
    norms = x.norm(dim=-1 if x.size(-2) > x.size(-1) else -2, keepdim=True)
    return x * (math.sqrt(short / long) / norms.clamp(min=1e-7))


class Adafactor(Untraced, torch.optim.Adafactor):
    """torch's Adafactor (Shazeer & Stern 2018, arXiv 1804.04235), but its scalars stay on the device: torch's waits for
    the GPU twice a parameter. The state is torch's."""

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            eps1, eps2 = group["eps"]
            sizes = torch._foreach_norm(group["params"])  # of the parameters, and of the steps they take
            torch._foreach_div_(sizes, [math.sqrt(p.numel()) for p in group["params"]])
            torch._foreach_clamp_min_(sizes, eps2)
            torch._foreach_mul_(group["params"], 1 - group["lr"] * group["weight_decay"])
            for p, size in zip(group["params"], sizes, strict=True):
                state = self.state[p]
                if not state:
                    state["step"] = torch.tensor(0.0)  # on the CPU
                    if p.dim() > 1:
                        state["row_var"], state["col_var"] = p.new_zeros(len(p), 1), p.new_zeros(1, p.size(1))
                    else:
                        state["variance"] = torch.zeros_like(p)
                state["step"] += 1
                step = state["step"].item()
                forget = step ** group["beta2_decay"]
                if p.dim() > 1:
                    row, col = state["row_var"], state["col_var"]
                    row.lerp_(rms(p.grad, dim=1).square_(), forget)
                    col.lerp_(rms(p.grad, dim=0).square_(), forget)
                    update = (row @ col).div_(row.mean().clamp(min=eps1))
                else:
                    update = state["variance"].lerp_(p.grad.square(), forget).clone()
                update.clamp_(min=eps1**2).rsqrt_().mul_(p.grad)
                size /= (rms(update) / group["d"]).clamp_(min=1.0)
                p.addcmul_(update, size, value=-min(group["lr"], step**-0.5))


def rms(x: Tensor, dim: int | None = None) -> Tensor:
    """The root mean square of x, or along dim, which it keeps."""
    n = x.numel() if dim is None else x.size(dim)
    return torch.linalg.vector_norm(x, dim=dim, keepdim=dim is not None) / math.sqrt(n)
