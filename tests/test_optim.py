"""The optimizers against torch's and transformers', the schedules against transformers'."""

import subprocess
import sys

import pytest
import torch
import transformers
from conftest import ROOT
from torch.utils._python_dispatch import TorchDispatchMode

import optim
from model import GPT, GPTConfig
from optim import Adafactor, Average, Muon, OptimConfig, learning_rate, make_optimizers


def options(optimizer, lr, weight_decay, **more):
    return OptimConfig(optimizer=optimizer, learning_rate=lr, min_lr=0.0, weight_decay=weight_decay, **more)


def rates(schedule, max_steps=100, min_lr=1e-4, **more):
    config = OptimConfig(schedule=schedule, learning_rate=1e-3, min_lr=min_lr, **{"warmup_steps": 10, **more})
    return [learning_rate(step, config, max_steps) for step in range(1, max_steps + 1)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_schedules_against_transformers(schedule):
    """transformers warms up from 0 at its step 0; ours is the same curve from the first step after the warmup on."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e-3)
    wsd = dict(num_training_steps=100, decay_type="linear", min_lr_ratio=0.1)
    theirs = {
        "cosine": lambda: transformers.get_cosine_with_min_lr_schedule_with_warmup(optimizer, 10, 100, min_lr=1e-4),
        "linear": lambda: transformers.get_linear_schedule_with_warmup(optimizer, 10, 100),
        "wsd": lambda: transformers.get_wsd_schedule(optimizer, 10, 20, **wsd),
        "constant": lambda: transformers.get_constant_schedule_with_warmup(optimizer, 10),
    }[schedule]()
    for step, ours in enumerate(rates(schedule, min_lr=0.0 if schedule == "linear" else 1e-4), start=1):
        want = theirs.get_last_lr()[0] if step > 10 else 1e-3 * step / 10
        assert ours == pytest.approx(want, abs=1e-9), step
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize(
    ("warmup_steps", "max_steps", "steps"),
    [(None, 100, 5), (None, 19073, 715), (7, 100, 7), (0.2, 100, 20), (1, 100, 1), (0, 100, 0), (100, 100, 100)],
)
def test_warmup(warmup_steps, max_steps, steps):
    have = rates("constant", max_steps, warmup_steps=warmup_steps)[: steps + 1]
    assert have == pytest.approx([min(1.0, step / max(1, steps)) * 1e-3 for step in range(1, steps + 2)][:max_steps])


def test_no_step_is_wasted():
    assert min(rates("linear", min_lr=0.0)) > 0
    assert rates("wsd", decay_fraction=1.0, warmup_steps=0, min_lr=0.0)[49] == pytest.approx(1e-3 * 0.51)


WRONG = [
    dict(beta1=1.0), dict(beta2=-0.1), dict(decay_fraction=1.5), dict(average=2.0), dict(min_lr=1.0),
    dict(embed_lr=-1.0), dict(head_lr=0.1, optimizer="adafactor"), dict(adam_eps=0.0), dict(grad_clip=-1.0),
    dict(vector_lr=0.1, learning_rate=0.0, min_lr=0.0), dict(warmup_steps=-0.1),
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_impossible_options(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        OptimConfig(**wrong)


def tiny(**flags):
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=32, **flags))


@pytest.mark.parametrize("outer_decay", [None, 0.3])
def test_adamw_against_for_loop(outer_decay):
    """Fused AdamW over our groups equals torch's plain one, on given gradients: those of a model would amplify
    rounding where they are zero (the biases of k)."""
    ours, theirs, groups = tiny(), tiny(), []
    for name, p in theirs.named_parameters():
        hidden, decay = name.startswith("h.") and p.dim() == 2, 0.1 if p.dim() == 2 else 0.0
        if outer_decay is not None and not hidden:
            decay = outer_decay
        groups.append({"params": [p], "weight_decay": decay, "lr": 1e-2 if hidden else 3e-2 if p.dim() == 2 else 2e-2})
    config = options("adamw", 1e-2, 0.1, outer_decay=outer_decay, embed_lr=3e-2, vector_lr=2e-2, beta2=0.9)
    optimizers = [*make_optimizers(ours, config), torch.optim.AdamW(groups, betas=(0.9, 0.9), foreach=False)]
    for group in optimizers[0].param_groups:
        group["lr"] *= group["scale"]  # as train_step does
    for _ in range(3):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close([*ours.parameters()], [*theirs.parameters()], rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e-5, 1e-7])  # 1e-5: the gradients of a GPT-2
def test_adafactor_against_transformers(scale):
    """The sum of 20 updates. Parameters start at 0, where float32 is exact enough; gradients differ by rows and shrink,
    so that neither the clipping nor the factored second moment is the same for all of them."""
    ours, theirs = tiny(), tiny()
    [optimizer] = make_optimizers(ours, options("adafactor", 5e-5, 0.0))
    oracle = transformers.Adafactor(theirs.parameters(), lr=5e-5, scale_parameter=False, relative_step=False)
    pairs = list(zip(ours.parameters(), theirs.parameters(), strict=True))
    for number in range(20):
        for a, b in pairs:
            if number == 0:
                a.data.zero_(), b.data.zero_()
            a.grad = torch.randn_like(a) * scale * (0.1 if number > 10 else 1)
            a.grad *= torch.arange(1.0, len(a) + 1).view(-1, *[1] * (a.dim() - 1))
            b.grad = a.grad.clone()
        optimizer.step()
        oracle.step()
    for a, b in pairs:
        assert (a - b).norm() < 1e-4 * b.norm(), a.shape


def in_parts(function, batch, rows):
    """As World.spread over four processes, one after another."""
    return torch.cat([function(x) for x in batch.tensor_split(4)])


MATRICES = [(64, 64)] * 5 + [(256, 64)] * 3 + [(64, 256)] * 3 + [(171, 64)] * 2
SPECTRAL = dict(ns_coefficients=(2.0, -1.5, 0.5), ns_steps=12, adjust_lr_fn="original")
KINDS = {
    "muon": (
        lambda params: Muon(params, options("muon", 1e-3, 0.1)),
        lambda params: torch.optim.Muon(params, lr=1e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ),
    "spectral muon of four processes": (
        lambda params: Muon(params, options("muon", 1e-3, 0.1, muon_update="spectral"), spread=in_parts),
        lambda params: torch.optim.Muon(params, lr=1e-3, weight_decay=0.1, **SPECTRAL),
    ),
    "adafactor, all terms count": (
        lambda params: Adafactor(params, lr=1e-1, weight_decay=0.1, eps=(1e-7, 1e-3), d=1.5),
        lambda params: torch.optim.Adafactor(params, lr=1e-1, weight_decay=0.1, eps=(1e-7, 1e-3), d=1.5),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_updates_and_state_are_torchs(monkeypatch, kind):
    """Ours goes on from torch's state, and torch's from ours, as if there had been one optimizer. Newton-Schulz is
    in float64 here, so that nothing but the formulas counts; Adafactor's batches are of three matrices at most."""
    monkeypatch.setattr(optim, "NEWTON_SCHULZ_DTYPE", torch.float64)
    monkeypatch.setattr(optim, "ADAFACTOR_BATCH", 3 * 64 * 64)
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.double)
    monkeypatch.setattr(torch, "bfloat16", torch.float64)  # which torch 2.15's Muon uses
    torch.manual_seed(0)
    shapes = MATRICES + [(64,), (64,), (1,)] * ("muon" not in kind)
    params = [torch.nn.Parameter(0.02 * torch.randn(shape)) for shape in shapes]
    params = params, [torch.nn.Parameter(p.detach().clone()) for p in params]
    ours, theirs = (make(p) for make, p in zip(KINDS[kind], params, strict=True))
    for step in range(15):
        for a, b in zip(*params, strict=True):
            a.grad = torch.randn_like(a) * 0.7 ** (step % 5)
            b.grad = a.grad.clone()
        ours.step()
        theirs.step()
        assert all((a - b).norm() < 1e-6 * b.norm() for a, b in zip(*params, strict=True))
        if step % 5 == 4:
            states = theirs.state_dict(), ours.state_dict()
            assert states[0]["param_groups"] == states[1]["param_groups"]
            ours, theirs = (make(p) for make, p in zip(KINDS[kind], params, strict=True))
            ours.load_state_dict(states[0])
            theirs.load_state_dict(states[1])


@pytest.mark.parametrize("part", [1.0, 0.2])
def test_average_against_its_definition(part):
    """Step s has the weight 1 / (part s) of the average, up to 1: with part = 1 that is the plain mean."""
    gpt, want = tiny(), {}
    average = Average(gpt, part)
    for step in range(1, 31):
        for p in gpt.parameters():
            p.data += torch.randn_like(p)
        average.update(step)
        share, weights = min(1.0, 1 / (part * step)), {name: p.clone() for name, p in gpt.state_dict().items()}
        want = {name: (1 - share) * want.get(name, 0.0) + share * p for name, p in weights.items()}
    torch.testing.assert_close(average.state_dict(), want, rtol=1e-5, atol=1e-5)
    average.swap()
    torch.testing.assert_close({**gpt.state_dict()}, want, rtol=1e-5, atol=1e-5)
    average.swap()
    torch.testing.assert_close({**gpt.state_dict()}, weights, rtol=0, atol=0)
    torch.testing.assert_close(Average(gpt, part, average.state_dict()).state_dict(), average.state_dict())


class Launches(TorchDispatchMode):
    """Counts what would be launches on a GPU."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("kind", "ours", "most"), [("muon", Muon, 66), ("adafactor", Adafactor, 32)])
def test_launches_follow_the_shapes_and_never_wait(kind, ours, most):
    """Of 12 layers as of 4. On "meta", where a step that waits for a value fails."""
    counts = []
    for n_layer in (4, 12):
        with torch.device("meta"):
            gpt = GPT(GPTConfig(block_size=16, vocab_size=64, n_layer=n_layer, n_head=2, n_embd=32))
        for p in gpt.parameters():
            p.grad = torch.empty_like(p)
        optimizer = make_optimizers(gpt, options(kind, 1e-3, 0.0))[-1]
        assert isinstance(optimizer, ours)
        optimizer.step()  # makes the state
        with Launches() as launches:
            optimizer.step()
        shapes = len({p.shape for group in optimizer.param_groups for p in group["params"]})
        counts.append(launches.count / shapes)
    assert counts[0] == counts[1] <= most


def test_no_optimizer_and_no_loaded_model_imports_torchs_compiler():
    """Which takes a third of the time to a run's first step, and to a sample's first token."""
    code = """if True:
        import sys, torch
        from checkpoint import model_of
        from model import GPT, GPTConfig
        from optim import OptimConfig, make_optimizers
        model = GPT(GPTConfig(block_size=8, vocab_size=9, n_layer=1, n_head=1, n_embd=4))
        model = model_of(model.config, model.state_dict(), "x")
        assert "torch._dynamo" not in sys.modules, "model_of"
        for name in ("adamw", "muon", "adafactor"):
            model(torch.tensor([[1, 2]]), torch.tensor([[2, 3]])).backward()
            for optimizer in make_optimizers(model, OptimConfig(optimizer=name)):
                optimizer.step()
                optimizer.load_state_dict(optimizer.state_dict())
                optimizer.zero_grad()
            assert "torch._dynamo" not in sys.modules, name"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
