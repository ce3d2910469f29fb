"""The optimizers, all of them torch's own, and the learning rate of step s."""

import math

import torch
from torch import nn


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
    return peak + (low - peak) * progress


def make_optimizers(
    model: nn.Module, optimizer: str, lr: float, weight_decay: float, betas: tuple[float, float]
) -> list[torch.optim.Optimizer]:
    """The optimizers of a GPT: every parameter is in exactly one group of one of them.

    Weight decay on matrices only, not on biases and gains. muon (Jordan et al. 2024) takes the blocks' matrices, with
    updates scaled to the size of AdamW's (Liu et al. 2025, arXiv 2502.16982) so that both share one learning rate;
    AdamW takes the embeddings, the head and all vectors.
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
        return [torch.optim.Adafactor(groups, lr=lr, eps=(1e-15, 1.0))]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=lr, betas=betas, eps=1e-8, fused=True)]
    if hidden:
        muon = torch.optim.Muon(hidden, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        optimizers.append(muon)
    return optimizers
