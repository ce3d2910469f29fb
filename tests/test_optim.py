import math

import pytest
import torch
import transformers

from model import GPT, GPTConfig
from optim import learning_rate, make_optimizers


def rates(schedule, warmup_steps=10, max_steps=100, low=1e-4, decay_fraction=0.2):
    return [
        learning_rate(s, schedule, 1e-3, low, warmup_steps, max_steps, decay_fraction) for s in range(1, max_steps + 1)
    ]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_against_transformers(schedule):
    """transformers warms up from 0 at its step 0; ours is the same curve from the first step after the warm-up on."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e-3)
    theirs = {
        "cosine": lambda: transformers.get_cosine_with_min_lr_schedule_with_warmup(optimizer, 10, 100, min_lr=1e-4),
        "linear": lambda: transformers.get_linear_schedule_with_warmup(optimizer, 10, 100),
        "wsd": lambda: transformers.get_wsd_schedule(
            optimizer, 10, 20, num_training_steps=100, decay_type="linear", min_lr_ratio=0.1
        ),
        "constant": lambda: transformers.get_constant_schedule_with_warmup(optimizer, 10),
    }[schedule]()
    for step, ours in enumerate(rates(schedule, low=0.0 if schedule == "linear" else 1e-4), start=1):
        want = theirs.get_last_lr()[0] if step > 10 else 1e-3 * step / 10
        assert ours == pytest.approx(want, abs=1e-9), step
        optimizer.step()
        theirs.step()


def test_no_step_is_wasted():
    assert min(rates("linear", low=0.0)) > 0
    assert rates("cosine", warmup_steps=0)[0] == 1e-3
    assert rates("cosine", warmup_steps=100)[-1] == 1e-3
    assert rates("wsd", decay_fraction=1.0, warmup_steps=0, low=0.0)[49] == pytest.approx(1e-3 * 0.51)


def model():
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=32))


def step(m, optimizers, n=3):
    """Steps on given gradients: those of a model would amplify rounding where they are zero (the biases of k)."""
    torch.manual_seed(1)
    for _ in range(n):
        for p in m.parameters():
            p.grad = torch.randn_like(p)
        for o in optimizers:
            o.step()
            o.zero_grad()


def test_adamw_against_for_loop():
    """Fused AdamW over our groups equals torch's plain one with decay on matrices alone."""
    ours, theirs = model(), model()
    step(ours, make_optimizers(ours, "adamw", 1e-2, 0.1, (0.9, 0.95)))
    decay = [p for p in theirs.parameters() if p.dim() == 2]
    rest = [p for p in theirs.parameters() if p.dim() == 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    step(theirs, [torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), foreach=False)])
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e-5, 1e-7])  # 1e-5: the gradients of a GPT-2
def test_adafactor_against_transformers(scale):
    """Every update of 20 steps, of matrices and of vectors; gradients differ by rows and shrink on the way, so that
    neither the clipping nor the factored second moment is the same for all of them."""
    ours, theirs = model(), model()
    [optimizer] = make_optimizers(ours, "adafactor", 5e-5, 0.0, (0.9, 0.95))
    oracle = transformers.Adafactor(theirs.parameters(), lr=5e-5, scale_parameter=False, relative_step=False)
    sizes = []
    for number in range(20):
        pairs = list(zip(ours.parameters(), theirs.parameters(), strict=True))
        before = [(a.detach().clone(), b.detach().clone()) for a, b in pairs]
        for a, b in pairs:
            rows = torch.arange(1.0, len(a) + 1).view(-1, *[1] * (a.dim() - 1))
            b.grad = torch.randn_like(b) * rows * scale * (0.1 if number > 10 else 1)
            a.grad = b.grad.clone()
        optimizer.step()
        oracle.step()
        for (a, b), (a0, b0) in zip(pairs, before, strict=True):
            update, want = a.detach() - a0, b.detach() - b0
            assert (update - want).norm() < 1e-2 * want.norm(), (number, a.shape)  # float32 steps at 1 are 1e-7
            sizes.append(want.square().mean().sqrt().item() / 5e-5)
    assert max(sizes) == pytest.approx(1.0, abs=1e-2)  # clipped
    assert min(sizes) < 0.3


def test_muon_takes_the_blocks_matrices_and_nothing_else():
    m = model()
    adamw, muon = make_optimizers(m, "muon", 1e-2, 0.1, (0.9, 0.95))
    names = {id(p): name for name, p in m.named_parameters()}
    taken = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    assert taken == {name for name, p in m.named_parameters() if name.startswith("h.") and p.dim() == 2}
    left = [names[id(p)] for group in adamw.param_groups for p in group["params"]]
    assert len(left) == len(set(left))
    assert set(left) | taken == set(names.values())
    assert not set(left) & taken


def test_muon_step_has_the_size_of_adamws():
    m = model()
    _, muon = make_optimizers(m, "muon", 1e-2, 0.0, (0.9, 0.95))
    before = {id(p): p.detach().clone() for p in m.parameters()}
    step(m, [muon], n=1)
    for group in muon.param_groups:
        for p in group["params"]:
            rms = (p - before[id(p)]).square().mean().sqrt().item()
            assert rms == pytest.approx(0.2 * 1e-2, rel=0.3)  # 0.2: AdamW's usual RMS
    assert math.isfinite(rms)
