"""The speed run's recipe, line by line: its model against one that is written out here, optimizers, schedule."""

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from configurator import configure
from model import GPT, GPTConfig
from optim import learning_rate, make_optimizers
from train_gpt2 import TrainConfig

CONFIG = Path(__file__).parent.parent / "config"
SMALL = ["--n_layer=2", "--n_embd=64", "--n_head=2", "--vocab_size=96", "--block_size=32"]


def recipe(*flags, name="speedrun_124m"):
    config, gpt_config, _ = configure(TrainConfig, GPTConfig, argv=[str(CONFIG / f"{name}.py"), *flags])
    torch.manual_seed(0)
    return config, GPT(gpt_config)


def norm(x, gain=None):
    x = x / (x.square().mean(-1, keepdim=True) + 1.19e-7).sqrt()
    return x if gain is None else x * gain


def turned(x):
    """(B, nh, T, hs): dimension i and i + hs / 4 turn by T / 1024^(i / (hs / 4)); the second half stays."""
    T, quarter = x.size(2), x.size(3) // 4
    angles = torch.arange(T)[:, None] * 1024.0 ** (-torch.arange(quarter) / quarter)
    z = torch.complex(x[..., :quarter], x[..., quarter : 2 * quarter]) * torch.exp(1j * angles)
    return torch.cat([z.real, z.imag, x[..., 2 * quarter :]], dim=-1)


def logits_by_hand(w, idx, n_layer, n_head):
    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def heads(x):
        return x.unflatten(-1, (n_head, -1)).transpose(1, 2)

    T = idx.size(1)
    x = norm(w["wte.weight"][idx], w["ln_e.weight"])
    for h in (f"h.{i}" for i in range(n_layer)):
        y = norm(x, w[f"{h}.ln_1.weight"])
        q, k, v = (heads(linear(y, f"{h}.attn.c_{part}")) for part in "qkv")
        if f"{h}.attn.value_gain" in w:
            v = v + w[f"{h}.attn.value_gain"][:, None, None] * heads(w["vte.0.weight"][idx])
        scores = 0.12 * turned(norm(q)) @ turned(norm(k)).mT
        scores = scores + torch.full((T, T), -math.inf).triu(1)
        z = (scores.softmax(-1) @ v).transpose(1, 2)  # (B, T, nh, hs)
        if f"{h}.attn.gate.weight" in w:
            z = z * 2 / (1 + (-y[..., :12] @ w[f"{h}.attn.gate.weight"].T).exp())[..., None]
        x = x + linear(z.flatten(2), f"{h}.attn.c_proj")
        y = linear(norm(x, w[f"{h}.ln_2.weight"]), f"{h}.mlp.c_fc")
        x = x + linear(y.clamp(min=0) ** 2, f"{h}.mlp.c_proj")
    z = linear(norm(x, w["ln_f.weight"]), "lm_head")
    return 15 * z / (z**2 + 225).sqrt()


@pytest.mark.parametrize(("tables", "gate"), [(0, 0), (1, 0), (0, 12)])
def test_the_model_is_the_recipes(tables, gate):
    """And what comes on top of it: value embeddings, one table, in the first block and in the last; gates."""
    _, model = recipe(*SMALL, "--n_layer=3", f"--value_embeds={tables}", f"--head_gate={gate}")
    assert [hasattr(block.attn, "value_gain") for block in model.h] == [tables > 0, False, tables > 0]
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.dim() == 1), std=0.3)
    torch.nn.init.normal_(model.lm_head.weight, std=2.0)
    idx = torch.randint(96, (3, 32))
    want = logits_by_hand(model.state_dict(), idx, n_layer=3, n_head=2)
    assert want.abs().max() > 12  # the cap counts
    assert torch.allclose(model(idx), want, atol=1e-4)


def test_the_size_is_the_recipes():
    with torch.device("meta"):
        _, model = recipe()
    config = model.config
    assert (config.n_layer, config.n_embd, config.n_head, config.block_size, config.vocab_size) == (
        12,
        768,
        6,
        1024,
        50304,
    )
    assert model.h[0].mlp.c_fc.out_features == 4 * 768
    assert {name.split(".")[-1] for name, _ in model.named_parameters()} == {"weight", "bias"}
    assert all(module.bias is not None for module in model.modules() if isinstance(module, torch.nn.Linear))


def test_initial_weights():
    _, model = recipe("--n_layer=2", "--n_embd=256", "--n_head=2", "--vocab_size=512", "--block_size=32")
    for name, p in model.named_parameters():
        if name.endswith("bias") or "c_proj" in name or "lm_head" in name:
            assert not p.any(), name
        elif "ln_" in name:
            assert (p == 1).all(), name
        else:
            want = 1.0 if name == "wte.weight" else 0.577 / math.sqrt(256)
            assert p.std().item() == pytest.approx(want, rel=0.02), name
    idx = torch.randint(512, (2, 32))
    assert not model(idx).any()
    assert model(idx, idx).item() == pytest.approx(math.log(512))


def groups_by_name(config, model):
    optimizers = make_optimizers(model, config)
    names = {p: name for name, p in model.named_parameters()}
    groups = [(optimizer, group) for optimizer in optimizers for group in optimizer.param_groups]
    found = {names[p]: (optimizer, group) for optimizer, group in groups for p in group["params"]}
    assert sum(len(group["params"]) for _, group in groups) == len(found) == len(names)  # each exactly once
    return found


def test_the_groups_are_the_recipes():
    config, model = recipe(*SMALL)
    for name, (optimizer, group) in groups_by_name(config, model).items():
        lr = config.learning_rate * group["scale"]
        if name.startswith("h.") and model.get_parameter(name).dim() == 2:
            assert isinstance(optimizer, torch.optim.Muon)
            assert (lr, group["weight_decay"], group["momentum"], group["nesterov"]) == (0.025, 0.05, 0.95, True), name
            assert (group["ns_coefficients"], group["ns_steps"]) == ((2, -1.5, 0.5), 12), name
        else:
            want = {"wte.weight": 0.7, "lm_head.weight": 0.004}.get(name, 0.015)
            assert isinstance(optimizer, torch.optim.AdamW)
            assert lr == pytest.approx(want), name
            assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.8, 0.95), 1e-10, 0.001), name
    assert config.grad_clip == 0


def test_the_groups_of_the_adamw_version():
    config, model = recipe(*SMALL, name="speedrun_124m_adamw")
    for name, (optimizer, group) in groups_by_name(config, model).items():
        hidden = name.startswith("h.") and model.get_parameter(name).dim() == 2
        want = 0.001 if hidden else {"wte.weight": 0.7, "lm_head.weight": 0.004}.get(name, 0.015)
        assert isinstance(optimizer, torch.optim.AdamW)
        assert config.learning_rate * group["scale"] == pytest.approx(want), name
        assert group["weight_decay"] == (1.0 if hidden else 0.002), name
        assert group["betas"] == ((0.9, 0.9) if hidden else (0.8, 0.95)), name
    assert recipe(*SMALL)[1].config == model.config


@pytest.mark.parametrize(("rows", "cols"), [(256, 64), (64, 256)])
def test_an_update_is_orthogonal(rows, cols):
    config, model = recipe(*SMALL)
    _, muon = make_optimizers(model, config)
    p = next(p for p in muon.param_groups[0]["params"] if p.shape == (rows, cols))
    before = p.detach().clone()
    p.grad = torch.randn(rows, 32) @ torch.randn(32, cols) + 0.1 * torch.randn(rows, cols)
    muon.param_groups[0]["params"] = [p]
    muon.step()
    update = (before * (1 - 0.025 * 0.05) - p.detach()) / 0.025
    sizes = torch.linalg.svdvals(update)
    assert sizes.sub(math.sqrt(max(1, rows / cols))).abs().max() < 0.03 * sizes.max()


@pytest.mark.parametrize(("rows", "cols"), [(256, 64), (64, 256), (64, 64)])
def test_an_even_update_has_one_size_for_all_units(rows, cols):
    torch.manual_seed(0)
    momentum, updates = torch.randn(rows, cols) * torch.rand(rows, 1) * torch.rand(cols), []
    for even in (False, True):
        config, model = recipe(*SMALL, f"--even_units={even}")
        _, muon = make_optimizers(model, config)
        updates.append(muon.direction(muon.param_groups[0], momentum[None])[0])
    orthogonal, update = updates
    if rows == cols:  # its rows and columns have one length already
        assert torch.equal(orthogonal, update)
        return
    units = [(orthogonal[i], update[i]) if rows > cols else (orthogonal[:, i], update[:, i]) for i in range(256)]
    assert max(unit.norm() for unit, _ in units) > 1.5 * min(unit.norm() for unit, _ in units)
    for before, after in units:
        assert torch.allclose(after, before / before.norm() / 2, atol=1e-6)  # 256 of them, 64 in all
    assert update.norm().item() == pytest.approx(8)


def test_the_schedule_is_the_recipes():
    config, _ = recipe(*SMALL)
    for step in range(1, 3251):
        progress = (step - 1) / 3250
        want = 0.025 * min(1.0, (1 - progress) / 0.7)
        have = learning_rate(
            step, config.schedule, config.learning_rate, config.min_lr, config.warmup_steps, 3250, config.decay_fraction
        )
        assert have == pytest.approx(want), step


def test_cross_entropy_is_of_capped_logits():
    _, model = recipe(*SMALL)
    torch.nn.init.normal_(model.lm_head.weight, std=3.0)
    idx = torch.randint(96, (2, 32))
    z = model(idx)
    assert 12 < z.abs().max() < 15
    assert model(idx, idx).item() == pytest.approx(F.cross_entropy(z.flatten(0, 1), idx.flatten()).item())
