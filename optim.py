"""The optimizers, torch's own or equal to them, and the learning rate of step s."""

import math
from collections.abc import Callable
from inspect import unwrap

import torch
from torch import Tensor, nn

from distributed import own_rows

NEWTON_SCHULZ_DTYPE = torch.bfloat16  # torch's
Function = Callable[[Tensor], Tensor]


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
    model: nn.Module, optimizer: str, lr: float, weight_decay: float, betas: tuple[float, float],
    spread: Callable[[Function, Tensor, int], Tensor] = alone,
) -> list[torch.optim.Optimizer]:  # fmt: skip
    """The optimizers of a GPT: every parameter is in exactly one group of one of them.

    Weight decay on matrices only, not on biases and gains. muon takes the blocks' matrices; AdamW takes the embeddings,
    the head and all vectors. spread is World.spread: it shares the work of muon out among processes.
    """
    params = dict(model.named_parameters())
    hidden = [p for name, p in params.items() if name.startswith("h.") and p.dim() == 2] if optimizer == "muon" else []
    rest = [p for p in params.values() if not any(p is h for h in hidden)]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if optimizer == "adafactor":
        # As fine-tuners use it: eps[1] makes the step absolute, not relative to the parameter's size (but for gains of
        # an RMS above 1). eps[0] is the floor of a mean squared gradient: its default, 1e-7, is above a GPT-2's, and a
        # matrix's update would lose its scale. An update is clipped to an RMS of 1 (Shazeer & Stern 2018, 1804.04235).
        return [Adafactor(groups, lr=lr, eps=(1e-15, 1.0))]
    optimizers: list[torch.optim.Optimizer] = [AdamW(groups, lr=lr, betas=betas, eps=1e-8, fused=True)]
    if optimizer == "muon" and hidden:
        optimizers.append(Muon(hidden, lr, weight_decay, spread))
    elif optimizer not in ("adamw", "muon"):
        raise NotImplementedError(f"optimizer = {optimizer!r}")
    return optimizers


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

    Updates are scaled to the size of AdamW's, so that both share one learning rate (Liu et al. 2025, arXiv 2502.16982).
    """

    def __init__(self, params: list[Tensor], lr: float, weight_decay: float, spread: Callable = alone):
        super().__init__(params, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self.spread = spread

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
                update = self.spread(lambda x, group=group: orthogonalize(x, group), update, rows).float()
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(weights, update.unbind(), alpha=-group["lr"] * 0.2 * math.sqrt(max(rows, cols)))

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
