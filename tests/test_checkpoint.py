import copy
import os
import random
import resource
import shutil
import signal

import pytest
import torch

import checkpoint
from configurator import UserError
from huggingface import load_model
from model import GPT, GPTConfig
from optim import OptimConfig, make_optimizers

CPU = torch.device("cpu")
TINY = GPTConfig(block_size=8, vocab_size=16, n_layer=1, n_head=1, n_embd=8)
SCALER = torch.amp.GradScaler("cpu", enabled=False)


def state(step, **changes):
    torch.manual_seed(step)
    return {"step": step, "model": GPT(TINY).state_dict(), "gpt_config": vars(TINY), "tokenizer": "bytes"} | changes


def save(folder, *steps, keep=0, best=None):
    return [checkpoint.save(state(step), folder, keep=keep, best_step=best) for step in steps][-1]


def steps(folder):
    return [checkpoint.step_of(path) for path in checkpoint.find(folder)]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def same(a, b):
    if isinstance(a, dict | list):
        pairs = [(a[k], b[k]) for k in a] if isinstance(a, dict) else zip(a, b, strict=True)
        return len(a) == len(b) and all(same(x, y) for x, y in pairs)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_the_newest_and_the_best_are_kept_and_what_a_kill_left_goes(tmp_path):
    (tmp_path / ".ckpt_000002.pt.123.partial").write_bytes(b"half")
    for step in range(1, 8):
        path = save(tmp_path, step, keep=2, best=min(step, 3))
        assert same(checkpoint.load(path), state(step))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt_000003.pt", "ckpt_000006.pt", "ckpt_000007.pt"]
    save(tmp_path, 1_000_000)
    assert steps(tmp_path) == [1_000_000, 7, 6, 3]  # by number, not by name


def test_a_newer_damaged_file_counts_for_nothing(tmp_path):
    """The run went on from step 2; the damaged ones must not push out what it writes now."""
    save(tmp_path, 1, 2)
    for step in (8, 9):
        checkpoint.path_of(tmp_path, step).write_bytes(b"half")
    save(tmp_path, 3, keep=2)
    assert steps(tmp_path) == [9, 8, 3, 2]
    save(tmp_path, 8, 9, keep=2)
    assert steps(tmp_path) == [9, 8]
    assert checkpoint.fault(checkpoint.path_of(tmp_path, 8)) is None


def test_a_full_disk_leaves_the_older_ones(tmp_path):
    save(tmp_path, 1, 2)
    before = contents(tmp_path)
    ignored, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before["ckpt_000002.pt"]) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            save(tmp_path, 3, keep=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert contents(tmp_path) == before
    (tmp_path / "ckpt_000000.pt").mkdir()  # which no unlink removes
    save(tmp_path, 3, keep=2)
    assert steps(tmp_path) == [3, 2, 0]


def test_any_damage_is_seen(tmp_path):
    """In the middle of the file or in the zip archive's own tables; a flip in padding between records harms nothing."""
    path = save(tmp_path, 1)
    whole, rng, seen = path.read_bytes(), random.Random(0), 0
    for size in [0, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(20))]:
        path.write_bytes(whole[:size])
        assert "damaged" in checkpoint.fault(path)
    tables = whole.index(b"PK\1\2")
    for at in [rng.randrange(len(whole)) for _ in range(150)] + [rng.randrange(tables, len(whole)) for _ in range(250)]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :])
        if checkpoint.fault(path) is None:
            assert same(checkpoint.load(path), state(1))
        else:
            seen += 1
    assert seen > 200


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_would_run_code_is_refused_without_running_it(tmp_path, capsys):
    evil, out = tmp_path / "evil", tmp_path / "run"
    out.mkdir()
    good = save(out, 1)
    for step, zipped in ((2, True), (3, False)):
        path = checkpoint.path_of(out, step)
        torch.save(state(step, optimizer=Malicious(evil)), path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(UserError, match="not a checkpoint"):
            load_model(str(path), CPU)
    assert checkpoint.newest_whole(out) == good
    assert capsys.readouterr().err.count("not a checkpoint") == 2
    assert not evil.exists()


def test_falls_back_to_the_newest_whole_one(tmp_path, capsys):
    assert checkpoint.newest_whole(tmp_path) is None
    path = save(tmp_path, 1, 2, 3, 4, 5)
    path.write_bytes(path.read_bytes()[:-100])
    torch.save({"weights": torch.ones(3)}, tmp_path / "ckpt_000004.pt")  # another program's
    shutil.copy(tmp_path / "ckpt_000001.pt", tmp_path / "ckpt_000003.pt")  # under another's name
    os.mkfifo(tmp_path / "ckpt_000006.pt")  # which nobody must wait for
    for each in checkpoint.find(tmp_path):  # a clock that was set back changes nothing
        os.utime(each, (1e9 - checkpoint.step_of(each),) * 2)
    assert checkpoint.step_of(checkpoint.newest_whole(tmp_path)) == 2
    said = capsys.readouterr().err.splitlines()
    wanted = ("is not a file", "damaged", "not a checkpoint", "holds step 1")
    assert [want in line for want, line in zip(wanted, said, strict=True)] == [True] * 4
    for each in (1, 2, 3, 4, 5):
        checkpoint.path_of(tmp_path, each).write_bytes(b"")
    with pytest.raises(UserError, match="no whole checkpoint"):
        checkpoint.newest_whole(tmp_path)


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("gpt_config", {"n_expert": 8}, "its gpt_config .*n_expert"),
        ("gpt_config", {"n_head": 3}, "its gpt_config .*n_head"),
        ("model", {"ln_f.bias": torch.zeros(1)}, r"ln_f.bias is torch.float32 \(1,\)"),
        ("model", {"ln_f.bias": torch.zeros(8).half()}, "ln_f.bias is torch.float16"),
        ("model", {"h.1.ln_1.weight": torch.ones(8)}, "h.1.ln_1.weight is .* it must be None"),
    ],
)
def test_a_model_of_another_kind_is_one_line(tmp_path, part, change, said):
    odd = state(1)
    odd[part] = odd[part] | change
    with pytest.raises(UserError, match=f"ckpt_000001.pt: {said}"):
        load_model(str(checkpoint.save(odd, tmp_path, keep=0, best_step=None)), CPU)


def trained(**options):
    """A small model and its optimizers after two steps, and what a checkpoint of them holds."""
    torch.manual_seed(0)
    model = GPT(TINY)
    optimizers = make_optimizers(model, OptimConfig(**options))
    for _ in range(2):
        step(model, optimizers)
    saved = state(1, model=model.state_dict(), optimizer=checkpoint.optimizer_state(model, optimizers), scaler={})
    return model, optimizers, copy.deepcopy(saved)


def step(model, optimizers):
    idx = torch.arange(8)[None]
    model(idx, idx).backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("options", [{}, {"embed_lr": 0.1, "vector_lr": 0.2, "beta1": 0.5}])
@pytest.mark.parametrize("kind", ["adamw", "muon", "adafactor"])
def test_an_optimizer_goes_on_where_it_was(kind, options):
    """With other options too, by which its parameters are grouped and ordered anew. Its numbers are those options'."""
    if kind == "adafactor" and options:
        options = {"weight_decay": 0.2, "outer_decay": 0.3}
    model, optimizers, saved = trained(optimizer=kind)
    resumed, before = GPT(TINY), copy.deepcopy(saved)
    checkpoint.load_weights(resumed, saved["model"], "x")
    restored = make_optimizers(resumed, OptimConfig(optimizer=kind, **options))
    numbers = copy.deepcopy([[{**group, "params": 0} for group in each.param_groups] for each in restored])
    checkpoint.restore(saved, resumed, restored, SCALER)
    assert same(checkpoint.optimizer_state(resumed, restored), saved["optimizer"])
    assert same([[{**group, "params": 0} for group in each.param_groups] for each in restored], numbers)
    step(resumed, restored)
    assert same(before, saved)  # which was copied: the file behind it need not stay mapped
    if not options:
        step(model, optimizers)
        assert same(model.state_dict(), resumed.state_dict())
        assert same(*(checkpoint.optimizer_state(*each) for each in ((model, optimizers), (resumed, restored))))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_moment_of_another_shape_is_refused_by_name(kind):
    """Fused code would read and write past its end."""
    model, optimizers, saved = trained(optimizer=kind)
    name = {"adamw": "exp_avg_sq", "muon": "momentum_buffer"}[kind]
    saved["optimizer"]["h.0.attn.c_q.weight"][name] = torch.zeros(3)
    with pytest.raises(UserError, match=f"{name} of h.0.attn.c_q.weight has shape"):
        checkpoint.restore(saved, model, optimizers, SCALER)
