import copy
import os
import random
import resource
import shutil
import signal

import pytest
import torch
from conftest import TRAIN, call
from weights import load_model

import checkpoint
from configurator import UserError
from model import GPT, GPTConfig
from optim import OptimConfig, make_optimizers

CPU = torch.device("cpu")
TINY = GPTConfig(block_size=8, vocab_size=16, n_layer=1, n_head=1, n_embd=8)


def state(step, config=TINY):
    torch.manual_seed(step)
    return {"step": step, "model": GPT(config).state_dict(), "gpt_config": vars(config), "tokenizer": "bytes"}


def steps(folder):
    return [checkpoint.step_of(path) for path in checkpoint.find(folder)]


def test_round_trip(tmp_path):
    path = checkpoint.save(state(3), tmp_path, keep=0, best_step=None)
    assert path.name == "ckpt_000003.pt"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    loaded = checkpoint.load(path)
    assert (loaded["step"], loaded["tokenizer"]) == (3, "bytes")
    for a, b in zip(loaded["model"].values(), state(3)["model"].values(), strict=True):
        assert torch.equal(a, b)


def test_keeps_the_newest_and_the_best(tmp_path):
    for step in range(1, 8):
        checkpoint.save(state(step), tmp_path, keep=2, best_step=3 if step >= 3 else step)
    assert steps(tmp_path) == [7, 6, 3]
    checkpoint.save(state(1_000_000), tmp_path, keep=0, best_step=None)
    assert steps(tmp_path) == [1_000_000, 7, 6, 3]  # by number, not by name


def test_a_newer_damaged_file_counts_for_nothing(tmp_path):
    """The run went on from step 2; the damaged ones must not push out what it writes now."""
    for step in (1, 2):
        checkpoint.save(state(step), tmp_path, keep=0, best_step=None)
    for step in (8, 9):
        checkpoint.path_of(tmp_path, step).write_bytes(b"half")
    checkpoint.save(state(3), tmp_path, keep=2, best_step=None)
    assert steps(tmp_path) == [9, 8, 3, 2]
    for step in (8, 9):
        checkpoint.save(state(step), tmp_path, keep=2, best_step=None)
    assert steps(tmp_path) == [9, 8]
    assert checkpoint.fault(checkpoint.path_of(tmp_path, 8)) is None


def test_a_full_disk_leaves_the_older_ones(tmp_path):
    for step in (1, 2):
        checkpoint.save(state(step), tmp_path, keep=2, best_step=None)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    size = len(before["ckpt_000002.pt"])
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for room in (0, 1, size // 2, size - 1):
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
            with pytest.raises(OSError, match="too large"):
                checkpoint.save(state(3), tmp_path, keep=2, best_step=None)
            assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    checkpoint.save(state(3), tmp_path, keep=2, best_step=None)
    assert steps(tmp_path) == [3, 2]


def test_an_old_one_that_cannot_be_deleted_is_a_warning(tmp_path, capsys):
    (tmp_path / "ckpt_000001.pt").mkdir()  # which no unlink removes
    for step in (2, 3):
        checkpoint.save(state(step), tmp_path, keep=1, best_step=None)
    assert steps(tmp_path) == [3, 1]
    first, second = capsys.readouterr().err.splitlines()
    assert first == second
    assert str(tmp_path / "ckpt_000001.pt") in first
    assert checkpoint.newest_whole(tmp_path) == checkpoint.path_of(tmp_path, 3)


def test_what_a_kill_left_is_cleaned_up(tmp_path):
    (tmp_path / ".ckpt_000002.pt.123.partial").write_bytes(b"half")
    path = checkpoint.save(state(1), tmp_path, keep=0, best_step=None)
    assert list(tmp_path.iterdir()) == [path]


def test_any_damage_is_seen(tmp_path):
    path = checkpoint.save(state(1), tmp_path, keep=0, best_step=None)
    whole = path.read_bytes()
    assert checkpoint.fault(path) is None
    rng = random.Random(0)
    for size in [0, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(20))]:
        path.write_bytes(whole[:size])
        assert "damaged" in checkpoint.fault(path)
    seen = 0
    for _ in range(200):
        at = rng.randrange(len(whole))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :])
        if checkpoint.fault(path) is None:  # a flip in padding between records harms nothing
            loaded, want = checkpoint.load(path), state(1)
            assert all(
                torch.equal(a, b) for a, b in zip(loaded.pop("model").values(), want.pop("model").values(), strict=True)
            )
            assert loaded == want
        else:
            seen += 1
    assert seen > 100


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_would_run_code_is_refused_without_running_it(tmp_path, capsys):
    evil = tmp_path / "evil"
    out = tmp_path / "run"
    out.mkdir()
    good = checkpoint.save(state(1), out, keep=0, best_step=None)
    for name, zipped in (("ckpt_000002.pt", True), ("ckpt_000003.pt", False)):
        bad = {**state(int(name[10:11])), "optimizers": Malicious(evil)}
        torch.save(bad, out / name, _use_new_zipfile_serialization=zipped)
        with pytest.raises(UserError, match="not a checkpoint"):
            load_model(str(out / name), CPU)
    assert checkpoint.newest_whole(out) == good
    assert capsys.readouterr().err.count("not a checkpoint") == 2
    assert not evil.exists()


def test_falls_back_to_the_newest_whole_one(tmp_path, capsys):
    assert checkpoint.newest_whole(tmp_path) is None
    for step in (1, 2, 3, 4, 5):
        path = checkpoint.save(state(step), tmp_path, keep=0, best_step=None)
    path.write_bytes(path.read_bytes()[:-100])
    torch.save({"weights": torch.ones(3)}, tmp_path / "ckpt_000004.pt")  # another program's
    shutil.copy(tmp_path / "ckpt_000001.pt", tmp_path / "ckpt_000003.pt")  # under another's name
    for path in checkpoint.find(tmp_path):  # a clock that was set back changes nothing
        os.utime(path, (1e9 - checkpoint.step_of(path),) * 2)
    assert checkpoint.step_of(checkpoint.newest_whole(tmp_path)) == 2
    said = capsys.readouterr().err.splitlines()
    assert ["damaged" in said[0], "not a checkpoint" in said[1], "holds step 1" in said[2]] == [True] * 3
    for path in checkpoint.find(tmp_path):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="no whole checkpoint"):
        checkpoint.newest_whole(tmp_path)


def test_another_versions_architecture(tmp_path):
    odd = state(1)
    odd["gpt_config"] = {**odd["gpt_config"], "n_expert": 8}
    path = checkpoint.save(odd, tmp_path, keep=0, best_step=None)
    with pytest.raises(UserError, match="n_expert"):
        load_model(str(path), CPU)


# ---- crafted or of another kind: whole, but not what a run has written


def trained(kind):
    """A small model and its optimizers after two steps, and what a checkpoint of them holds."""
    torch.manual_seed(0)
    model = GPT(TINY)
    optimizers = make_optimizers(model, OptimConfig(optimizer=kind))
    idx = torch.arange(8)[None]
    for _ in range(2):
        model(idx, idx).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return model, optimizers, saved_of(model, optimizers)


def saved_of(model, optimizers):
    saved = state(1) | {"model": model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
    saved |= {"config": {}, "scaler": {}, "data": {}, "best": {"step": None, "val_loss": 1.5}, "skipped": 0}
    saved |= {"stopped": False, "target_reached": False, "path": "ckpt_000001.pt"}
    return copy.deepcopy(checkpoint.LATER | saved | {"seconds": 1.0})


SCALER = torch.amp.GradScaler("cpu", enabled=False)


@pytest.mark.parametrize("kind", ["adamw", "muon", "adafactor"])
def test_optimizers_are_restored_as_torch_does(kind):
    _, _, saved = trained(kind)
    models = []

    def as_torch_does(saved, model, optimizers, scaler):
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(copy.deepcopy(state))

    for restore in (checkpoint.restore, as_torch_does):
        model = GPT(TINY)
        checkpoint.load_weights(model, saved["model"], "x")
        optimizers = make_optimizers(model, OptimConfig(optimizer=kind))
        restore(saved, model, optimizers, SCALER)
        before = copy.deepcopy(saved)
        model(torch.arange(8)[None], torch.arange(8)[None]).backward()
        for optimizer in optimizers:
            optimizer.step()
        models.append([model.state_dict(), [optimizer.state_dict() for optimizer in optimizers]])
        assert same(before, saved)  # which was copied: the file behind it need not stay mapped
    assert same(*models)


def same(a, b):
    if isinstance(a, dict | list):
        pairs = [(a[k], b[k]) for k in a] if isinstance(a, dict) else zip(a, b, strict=True)
        return len(a) == len(b) and all(same(x, y) for x, y in pairs)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("kind", ["adamw", "muon", "adafactor"])
def test_settings_of_optimizers_are_the_configs(kind):
    """Crafted betas or a crafted `fused` do not get in."""
    model, optimizers, saved = trained(kind)
    before = copy.deepcopy([optimizer.param_groups for optimizer in optimizers])
    for part in saved["optimizers"]:
        for group in part["param_groups"]:
            group |= {"betas": (2.0, -1.0), "weight_decay": 9.0, "fused": False, "momentum": 7.0, "foreach": True}
    checkpoint.restore(saved, model, optimizers, SCALER)
    assert same(before, [optimizer.param_groups for optimizer in optimizers])


def test_no_state_yet_is_as_torch_has_it():
    """All steps so far were skipped."""
    model = GPT(TINY)
    optimizers = make_optimizers(model, OptimConfig(optimizer="adamw"))
    checkpoint.restore(saved_of(model, optimizers), model, optimizers, SCALER)
    assert not optimizers[0].state


SPOILERS = {
    "smaller": lambda t: t.flatten()[:1].clone(),
    "larger": lambda t: torch.zeros(*t.shape, 2),
    "half": lambda t: t.half(),
    "double": lambda t: t.double(),
    "whole numbers": lambda t: t.int(),
    "complex": lambda t: t.to(torch.complex64),
    "sparse": lambda t: t.to_sparse(),
    "no numbers": lambda t: t.to("meta"),
    "a number": lambda t: 1.0,
    "null": lambda t: None,
    "a list": lambda t: [t],
}


@pytest.mark.parametrize("kind", ["adamw", "muon", "adafactor"])
@pytest.mark.parametrize("what", SPOILERS)
def test_crafted_optimizer_state_is_refused_by_name(kind, what):
    model, optimizers, saved = trained(kind)
    for number, part in enumerate(saved["optimizers"]):
        i = 0 if what != "smaller" else max(part["state"])
        for name, tensor in part["state"][i].items():
            if tensor.numel() == 1 and what == "smaller":
                continue
            crafted = copy.deepcopy(saved)
            crafted["optimizers"][number]["state"][i][name] = SPOILERS[what](tensor)
            with pytest.raises(UserError, match=f"ckpt_000001.pt: the optimizer's state of .*: {name} is "):
                checkpoint.restore(crafted, model, optimizers, SCALER)


def test_a_moment_that_lies_otherwise_is_laid_out_anew():
    """The shape is right, but all of it is one number, or its rows are columns: fused code takes them one by one."""
    model, optimizers, saved = trained("adamw")
    moments = saved["optimizers"][0]["state"][0]
    want = moments["exp_avg_sq"]
    moments["exp_avg"] = torch.zeros(1).expand(want.shape)
    moments["exp_avg_sq"] = want.t().contiguous().t()
    checkpoint.restore(saved, model, optimizers, SCALER)
    have = optimizers[0].state[model.wte.weight]
    assert have["exp_avg"].stride() == have["exp_avg_sq"].stride() == want.stride()
    assert torch.equal(have["exp_avg_sq"], want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(), "optimizers are not"),
        (lambda s: s.append(s[0]), "optimizers are not"),
        (lambda s: s.__setitem__(0, None), "optimizers are not"),
        (lambda s: s[0].pop("state"), "optimizers are not"),
        (lambda s: s[0].update(state=[1]), "optimizers are not"),
        (lambda s: s[0]["state"].pop(0), "state of"),
        (lambda s: s[0]["state"].update({99: s[0]["state"][0]}), "state of"),
        (lambda s: s[0]["state"].update({"a": s[0]["state"].pop(0)}), "state of"),
        (lambda s: s[0]["state"].update({0: None}), "wte.weight: no tensors"),
        (lambda s: s[0]["state"][0].pop("step"), "wte.weight: step is missing"),
        (lambda s: s[0]["state"][0].update(max_exp_avg_sq=torch.zeros(3)), "wte.weight: max_exp_avg_sq has no place"),
    ],
)
def test_optimizers_of_another_kind(change, message):
    model, optimizers, saved = trained("adamw")
    change(saved["optimizers"])
    with pytest.raises(UserError, match=message):
        checkpoint.restore(saved, model, optimizers, SCALER)


def test_another_optimizer():
    model, _, saved = trained("adamw")
    muon = make_optimizers(model, OptimConfig(optimizer="muon"))
    with pytest.raises(UserError, match="optimizers are not the 2"):
        checkpoint.restore(saved, model, muon, SCALER)


def test_the_scaler_keeps_its_own_settings():
    model, optimizers, saved = trained("adamw")
    scaler = torch.amp.GradScaler("cpu")
    then = torch.amp.GradScaler("cpu", init_scale=8.0).state_dict() | {"_growth_tracker": 5, "growth_factor": 1e30}
    checkpoint.restore(saved | {"scaler": then}, model, optimizers, scaler)
    want = torch.amp.GradScaler("cpu").state_dict() | {"scale": 8.0, "_growth_tracker": 5}
    assert scaler.state_dict() == want


@pytest.mark.parametrize("what", SPOILERS)
def test_weights_that_are_not_the_models_are_refused_by_name(tmp_path, what):
    for name in ("wte.weight", "h.0.attn.c_q.weight", "ln_f.bias"):
        odd = state(1)
        odd["model"][name] = SPOILERS[what](odd["model"][name])
        path = checkpoint.save(odd, tmp_path, keep=0, best_step=None)
        with pytest.raises(UserError, match=f"{path}: {name} is ") as error:
            load_model(str(path), CPU)
        assert "\n" not in str(error.value)


def test_weights_too_many_or_too_few(tmp_path):
    odd = state(1)
    odd["model"]["h.1.ln_1.weight"] = torch.ones(8)
    with pytest.raises(UserError, match=r"h.1.ln_1.weight has no place"):
        load_model(str(checkpoint.save(odd, tmp_path, keep=0, best_step=None)), CPU)
    del odd["model"]["h.1.ln_1.weight"], odd["model"]["ln_f.weight"]
    with pytest.raises(UserError, match=r"ln_f.weight is missing"):
        load_model(str(checkpoint.save(odd, tmp_path, keep=0, best_step=None)), CPU)


@pytest.mark.parametrize(
    "sizes",
    [
        dict(n_layer=10**9),
        dict(n_layer=10**9, n_embd=1),
        dict(n_layer=1000, n_embd=1, mlp_hidden=1),  # as many numbers as the file has bytes, but not as many tensors
        dict(vocab_size=2**60),
        dict(block_size=2**60),
        dict(mlp_hidden=2**62),
        dict(n_embd=2**62, n_head=1),
        dict(n_layer="2"),
        dict(n_layer=1.5),
        dict(n_layer=None),
        dict(n_layer=0),
        dict(n_layer=True),
        dict(pos=None),
        dict(pos="nowhere"),
        dict(norm_eps=float("nan")),
        {1: 2},
        {"a\nb": 2},
    ],
    ids=str,
)
def test_sizes_that_the_file_cannot_hold_are_refused_before_anything_is_built(tmp_path, sizes, monkeypatch):
    monkeypatch.setattr("weights.GPT", None)
    odd = state(1) | {"gpt_config": {**vars(TINY), **sizes}}
    path = checkpoint.save(odd, tmp_path, keep=0, best_step=None)
    with pytest.raises(UserError, match=f"{path}: its gpt_config"):
        load_model(str(path), CPU)


@pytest.mark.parametrize(
    "change",
    [
        dict(model=None), dict(model=[]), dict(step="1"), dict(step=True), dict(step=10**5000), dict(gpt_config=[]),
        dict(tokenizer=5),
    ],
    ids=lambda change: str([type(value) for value in change.values()]),
)  # fmt: skip
def test_another_kind_of_file(tmp_path, change):
    path = tmp_path / "ckpt_000001.pt"
    torch.save(state(1) | change, path)
    assert checkpoint.fault(path)
    os.rename(path, tmp_path / "any_name.pt")
    assert checkpoint.fault(tmp_path / "any_name.pt") or "step" in change


@pytest.mark.parametrize("name", ["model", "step", "gpt_config", "tokenizer"])
def test_a_part_that_is_missing(tmp_path, name):
    part = state(1)
    del part[name]
    torch.save(part, tmp_path / "any_name.pt")
    assert checkpoint.fault(tmp_path / "any_name.pt") == "is not a checkpoint of a run"


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "ckpt_000001.pt")
    with pytest.raises(UserError, match="no whole checkpoint"):
        checkpoint.newest_whole(tmp_path)


MAY_BE_NONE = {"mean_loss", "training_weights"}
RUN_CHANGES = [
    *({name: value} for name in checkpoint.GOES_ON for value in (None, "1", (1,), 1j)
      if value is not None or name not in MAY_BE_NONE),
    dict(best={}), dict(best={"val_loss": 1.0}), dict(best={"step": "1", "val_loss": 1.0}),
    dict(best={"step": 1, "val_loss": None}), dict(lowest={"step": None, "val_loss": 1.0}),
    dict(scaler={"scale": None, "_growth_tracker": 1}), dict(scaler={"scale": 2.0}), dict(skipped=True),
    dict(gpt_config={**vars(TINY), "n_layer": 10**9}),
]  # fmt: skip


@pytest.mark.parametrize("change", RUN_CHANGES, ids=str)
def test_a_run_goes_on_only_from_what_a_run_has_written(tmp_path, change):
    _, _, saved = trained("adamw")
    del saved["path"]
    path = checkpoint.save(saved, tmp_path, keep=0, best_step=None)
    assert checkpoint.load_run(path)["path"] == path
    checkpoint.save(saved | change, tmp_path, keep=0, best_step=None)
    with pytest.raises(UserError, match=f"{path}.*{next(iter(change))}"):
        checkpoint.load_run(path)


def test_training_refuses_a_crafted_checkpoint(data_dir, tmp_path):
    flags = [*TRAIN, f"--data_dir={data_dir}", f"--out_dir={tmp_path}", "--resume=True", "--max_steps=2"]
    assert call("train_gpt2.py", *flags).returncode == 0
    path = tmp_path / "ckpt_000002.pt"
    whole = torch.load(path, weights_only=True)

    def crafted(change):
        state = copy.deepcopy(whole)
        change(state)
        torch.save(state, path)
        done = call("train_gpt2.py", *flags, "--max_steps=4")
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert done.stderr.startswith("error: ")
        assert str(path) in done.stderr
        return done.stderr

    assert "exp_avg is float32 (1,), but" in crafted(
        lambda s: s["optimizers"][0]["state"][0].update(exp_avg=torch.zeros(1))
    )
    assert "wte.weight is" in crafted(lambda s: s["model"].update({"wte.weight": torch.zeros(1)}))
    assert "learning_rate = None" in crafted(lambda s: s["config"].update(learning_rate=None))
    assert "skipped is missing, or of a type" in crafted(lambda s: s.update(skipped="1"))
