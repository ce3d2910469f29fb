import math
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


@pytest.mark.parametrize(
    "wrong",
    [
        dict(beta1=1.0), dict(outer_beta2=-0.1), dict(decay_fraction=1.5), dict(average=2.0), dict(min_lr=1.0),
        dict(embed_lr=-1.0), dict(head_lr=0.1, optimizer="adafactor"), dict(adam_eps=0.0), dict(grad_clip=-1.0),
        dict(vector_lr=0.1, learning_rate=0.0, min_lr=0.0),
    ],
    ids=str,
)  # fmt: skip
def test_impossible_options(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        OptimConfig(**wrong)


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
    step(ours, make_optimizers(ours, options("adamw", 1e-2, 0.1)))
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
    [optimizer] = make_optimizers(ours, options("adafactor", 5e-5, 0.0))
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


def in_parts(parts):
    """A spread over so many processes, one after another."""
    return lambda function, batch, rows: torch.cat([function(x) for x in batch.tensor_split(parts)])


def against(ours, theirs, params, n=20):
    """The largest relative difference of the parameters after n steps on the same gradients, which shrink."""
    for number in range(n):
        for a, b in zip(*params, strict=True):
            a.grad = torch.randn_like(a) * 0.7**number
            b.grad = a.grad.clone()
        ours.step()
        theirs.step()
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(*params, strict=True))


def in_float64(monkeypatch):
    """Newton-Schulz in both."""
    monkeypatch.setattr(optim, "NEWTON_SCHULZ_DTYPE", torch.float64)
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.double)
    monkeypatch.setattr(torch, "bfloat16", torch.float64)  # torch 2.15's Muon converts with .to


def copies(shapes):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(0.02 * torch.randn(shape)) for shape in shapes]
    return params, [torch.nn.Parameter(p.detach().clone()) for p in params]


MATRICES = [(64, 64)] * 5 + [(256, 64)] * 3 + [(64, 256)] * 3 + [(171, 64)] * 2


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("exact", [True, False])
def test_muon_is_torchs(monkeypatch, exact, parts):
    """Exact: with Newton-Schulz in float64, so that nothing but the formula counts. Products in bfloat16 may add up in
    another order, and that changes an update by 1e-2 of itself, which is 1e-4 of a matrix after 20 steps."""
    if exact:
        in_float64(monkeypatch)
    params = copies(MATRICES)
    ours = Muon(params[0], options("muon", 1e-3, 0.1), spread=in_parts(parts))
    theirs = torch.optim.Muon(params[1], lr=1e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    assert against(ours, theirs, params) < (1e-6 if exact else 1e-3)


@pytest.mark.parametrize(
    ("ours", "theirs", "shapes"),
    [
        (
            lambda params: Muon(params, options("muon", 1e-3, 0.1)),
            lambda params: torch.optim.Muon(params, lr=1e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
            MATRICES,
        ),
        (
            lambda params: Adafactor(params, lr=1e-3, weight_decay=0.1, eps=(1e-15, 1.0)),
            lambda params: torch.optim.Adafactor(params, lr=1e-3, weight_decay=0.1, eps=(1e-15, 1.0)),
            [*MATRICES, (64,), (1,)],
        ),
        (
            lambda params: Adafactor(params, lr=1e-1, weight_decay=0.1, eps=(1e-7, 1e-3), d=1.5),  # all terms count
            lambda params: torch.optim.Adafactor(params, lr=1e-1, weight_decay=0.1, eps=(1e-7, 1e-3), d=1.5),
            [*MATRICES, (64,), (1,)],
        ),
    ],
)
def test_state_is_torchs(monkeypatch, ours, theirs, shapes):
    """Ours goes on from torch's state, and torch's from ours, as if there had been one optimizer."""
    in_float64(monkeypatch)
    params = copies(shapes)
    one, two = ours(params[0]), theirs(params[1])
    for _ in range(3):
        assert against(one, two, params, n=5) < 1e-6
        states = one.state_dict(), two.state_dict()
        one, two = ours(params[0]), theirs(params[1])
        one.load_state_dict(states[1])
        two.load_state_dict(states[0])
        assert states[0]["param_groups"] == states[1]["param_groups"]


@pytest.mark.parametrize("part", [1.0, 0.2])
def test_average_against_its_definition(part):
    """Step s has the weight 1 / (part s) of the average, up to 1: with part = 1 that is the plain mean."""
    m = model()
    average, history = Average(m, part), []
    for s in range(1, 31):
        step(m, make_optimizers(m, options("adamw", 1e-2, 0.1)), n=1)
        history.append({name: p.detach().clone() for name, p in m.state_dict().items()})
        average.update(s)
    shares = [min(1.0, 1 / (part * s)) for s in range(1, 31)]
    weights = [share * math.prod(1 - later for later in shares[s + 1 :]) for s, share in enumerate(shares)]
    assert sum(weights) == pytest.approx(1.0)
    for name, have in average.state_dict().items():
        want = sum(weight * past[name] for weight, past in zip(weights, history, strict=True))
        assert torch.allclose(have, want, atol=1e-6), name
    assert average.state_dict().keys() == m.state_dict().keys()
    average.swap()
    assert not torch.equal(m.wte.weight, history[-1]["wte.weight"])
    average.swap()
    assert all(torch.equal(p, history[-1][name]) for name, p in m.state_dict().items())


class Launches(TorchDispatchMode):
    """Counts what would be launches on a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


def without_values(shapes):
    """Parameters and gradients on a device where a step that waits for a value fails."""
    params = [torch.nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes]
    for p in params:
        p.grad = torch.empty_like(p)
    return params


def test_muon_has_a_tenth_of_torchs_launches():
    params = without_values([(64, 64)] * 48 + [(256, 64)] * 24)
    counts = []
    for muon in (Muon(params, options("muon", 1e-3, 0.1)), torch.optim.Muon(params)):
        muon.step()  # makes the state
        with Launches() as launches:
            muon.step()
        counts.append(launches.count)
    assert 10 * counts[0] < counts[1]


@pytest.mark.parametrize("optimizer", ["adafactor", "muon"])
def test_steps_do_not_wait_for_the_device(optimizer):
    with torch.device("meta"):
        m = model()
    for p in m.parameters():
        p.grad = torch.empty_like(p)
    make_optimizers(m, options(optimizer, 1e-3, 0.1))[-1].step()


def test_muon_takes_the_blocks_matrices_and_nothing_else():
    m = model()
    adamw, muon = make_optimizers(m, options("muon", 1e-2, 0.1))
    names = {id(p): name for name, p in m.named_parameters()}
    taken = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    assert taken == {name for name, p in m.named_parameters() if name.startswith("h.") and p.dim() == 2}
    left = [names[id(p)] for group in adamw.param_groups for p in group["params"]]
    assert len(left) == len(set(left))
    assert set(left) | taken == set(names.values())
    assert not set(left) & taken


def test_muon_step_has_the_size_of_adamws():
    m = model()
    _, muon = make_optimizers(m, options("muon", 1e-2, 0.0))
    before = {id(p): p.detach().clone() for p in m.parameters()}
    step(m, [muon], n=1)
    for group in muon.param_groups:
        for p in group["params"]:
            rms = (p - before[id(p)]).square().mean().sqrt().item()
            assert rms == pytest.approx(0.2 * 1e-2, rel=0.3)  # 0.2: AdamW's usual RMS
    assert math.isfinite(rms)


def test_a_flag_that_only_its_literal_knows_is_an_error():
    with pytest.raises(NotImplementedError, match="optimizer = 'lion'"):
        make_optimizers(torch.nn.Linear(2, 2), OptimConfig(optimizer="lion"))
    with pytest.raises(NotImplementedError, match="schedule = 'step'"):
        rates("step")


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
