"""The speed run's recipe, line by line: its model against one that is written out here, optimizers, schedule."""

import math

import pytest
import torch
from conftest import ROOT
from torch.nn import functional as F

from configurator import configure
from model import GPT, GPTConfig
from optim import learning_rate, make_optimizers
from train_gpt2 import TrainConfig

SMALL = ["--n_layer=2", "--n_embd=64", "--n_head=2", "--vocab_size=96", "--block_size=32"]


def recipe(*flags, name="speedrun_124m"):
    config, gpt_config, _ = configure(TrainConfig, GPTConfig, argv=[str(ROOT / f"config/{name}.py"), *flags])
    torch.manual_seed(0)
    return config, GPT(gpt_config)


def norm(x, gain=1.0):
    return x / (x.square().mean(-1, keepdim=True) + 1.19e-7).sqrt() * gain


def turned(x):
    """(B, nh, T, hs): dimension i and i + hs / 4 turn by T / 1024^(i / (hs / 4)); the second half stays."""
    T, quarter = x.size(2), x.size(3) // 4
    angles = torch.arange(T)[:, None] * 1024.0 ** (-torch.arange(quarter) / quarter)
    z = torch.complex(x[..., :quarter], x[..., quarter : 2 * quarter]) * torch.exp(1j * angles)
    return torch.cat([z.real, z.imag, x[..., 2 * quarter :]], dim=-1)


def logits_by_hand(w, idx, tables):
    """tables: of each block the table of value embeddings, or None."""

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def heads(x):
        return x.unflatten(-1, (2, -1)).transpose(1, 2)

    T = idx.size(1)
    x = norm(w["wte.weight"][idx], w["ln_e.weight"])
    for i, table in enumerate(tables):
        h = f"h.{i}"
        y = norm(x, w[f"{h}.ln_1.weight"])
        q, k, v = (heads(linear(y, f"{h}.attn.c_{part}")) for part in "qkv")
        if table is not None:
            v = v + w[f"{h}.attn.value_gain"][:, None, None] * heads(w[f"vte.{table}.weight"][idx])
        scores = 0.12 * turned(norm(q)) @ turned(norm(k)).mT
        scores = scores + torch.full((T, T), -math.inf).triu(1)
        z = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + linear(z, f"{h}.attn.c_proj")
        y = linear(norm(x, w[f"{h}.ln_2.weight"]), f"{h}.mlp.c_fc")
        x = x + linear(y.clamp(min=0) ** 2, f"{h}.mlp.c_proj")
    z = linear(norm(x, w["ln_f.weight"]), "lm_head")
    return 15 * z / (z**2 + 225).sqrt()


@pytest.mark.parametrize("tables", [[None] * 3, [0, None, 0], [0, 1, None, 0, 1], [0, 1, 1]], ids=str)
def test_the_model_is_the_recipes(tables):
    """And what comes on top: tables of value embeddings, for the first blocks and again for the last."""
    count = len(set(tables) - {None})
    _, model = recipe(*SMALL, f"--n_layer={len(tables)}", f"--value_embeds={count}")
    assert [hasattr(block.attn, "value_gain") for block in model.h] == [table is not None for table in tables]
    assert all((p == 0.5).all() for name, p in model.named_parameters() if name.endswith("value_gain"))
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.dim() == 1), std=0.3)
    torch.nn.init.normal_(model.lm_head.weight, std=2.0)
    idx = torch.randint(96, (3, 32))
    want = logits_by_hand(model.state_dict(), idx, tables)
    assert want.abs().max() > 12  # the cap counts
    torch.testing.assert_close(model(idx), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(idx, idx), F.cross_entropy(want.flatten(0, 1), idx.flatten()))


def test_size_and_initial_weights_are_the_recipes():
    with torch.device("meta"):
        _, model = recipe()
    c = model.config
    assert (c.n_layer, c.n_embd, c.n_head, c.block_size, c.vocab_size) == (12, 768, 6, 1024, 50304)
    assert model.h[0].mlp.c_fc.out_features == 4 * 768
    assert all(module.bias is not None for module in model.modules() if isinstance(module, torch.nn.Linear))
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
    assert model(idx, idx).item() == pytest.approx(math.log(512))


@pytest.mark.parametrize("name", ["speedrun_124m", "speedrun_124m_adamw"])
def test_the_groups_and_the_schedule_are_the_recipes(name):
    config, model = recipe(*SMALL, name=name)
    assert model.config == recipe(*SMALL)[1].config
    names, muon, seen = {p: name for name, p in model.named_parameters()}, name == "speedrun_124m", []
    for optimizer in make_optimizers(model, config):
        for group in optimizer.param_groups:
            for name in (names[p] for p in group["params"]):
                seen.append(name)
                have = config.learning_rate * group["scale"], group["weight_decay"]
                hidden = name.startswith("h.") and model.get_parameter(name).dim() == 2
                want = {"wte.weight": 0.7, "lm_head.weight": 0.004}.get(name, 0.015), 0.001 if muon else 0.002
                if hidden:
                    want = (0.025, 0.05) if muon else (0.001, 1.0)
                assert have == pytest.approx(want), name
                if hidden and muon:
                    assert (group["momentum"], group["nesterov"]) == (0.95, True)
                    assert (group["ns_coefficients"], group["ns_steps"]) == ((2, -1.5, 0.5), 12)
                    assert group["adjust_lr_fn"] == "original"  # sqrt(max(1, rows / cols))
                else:
                    assert isinstance(optimizer, torch.optim.AdamW)
                    assert (group["betas"], group["eps"]) == ((0.8, 0.95) if muon else (0.9, 0.9), 1e-10)
    assert sorted(seen) == sorted(names.values())
    assert config.grad_clip == 0
    for step in range(1, 3251) if muon else ():
        want = 0.025 * min(1.0, (1 - (step - 1) / 3250) / 0.7)
        assert learning_rate(step, config, config.max_steps) == pytest.approx(want), step


@pytest.mark.parametrize(("rows", "cols"), [(256, 64), (64, 256), (64, 64)])
def test_an_even_update_has_one_size_for_all_units(rows, cols):
    torch.manual_seed(0)
    momentum, updates = torch.randn(rows, cols) * torch.rand(rows, 1) * torch.rand(cols), []
    for even in (False, True):
        config, model = recipe(*SMALL, f"--even_units={even}")
        _, muon = make_optimizers(model, config)
        updates.append(muon.direction(muon.param_groups[0], momentum[None])[0])
    orthogonal, update = (x if rows > cols else x.T for x in updates)
    if rows == cols:  # its rows and columns have one length already
        assert torch.equal(orthogonal, update)
        return
    assert (torch.linalg.svdvals(orthogonal) - 1).abs().max() < 0.03
    lengths = orthogonal.norm(dim=1, keepdim=True)
    assert lengths.max() > 1.5 * lengths.min()
    torch.testing.assert_close(update, orthogonal / lengths / 2)  # 256 of them, 64 in all


def test_the_evening_run_is_the_recipe_but_for_what_it_says():
    """Two tables, even updates, a quarter of the batch: half of each learning rate, and as many tokens."""
    (recipes, model), (config, own) = recipe(*SMALL), recipe(*SMALL, name="one_gpu_124m")
    assert vars(own.config) == vars(model.config) | dict(value_embeds=2)
    lrs = {name: getattr(recipes, name) / 2 for name in ("learning_rate", "embed_lr", "head_lr", "vector_lr")}
    said = dict(total_batch_size=131072, max_steps=4 * 3250, even_units=True, **lrs)
    elsewhere = ("out_dir", "val_interval", "sample_interval", "checkpoint_interval")
    said |= {name: getattr(config, name) for name in elsewhere}
    assert vars(config) == vars(recipes) | said
