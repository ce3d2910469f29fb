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


def test_as_it_was():
    saved = {**vars(TINY), "dropout": 0.5}
    del saved["qk_norm"]  # a flag that came later
    path = "ckpt_000001.pt"
    assert checkpoint.as_it_was(saved, GPTConfig(), {}, (), path) == GPTConfig(**saved)
    asked = GPTConfig(dropout=0.1, n_layer=1)
    with pytest.raises(UserError, match=r"a.py:3: dropout = 0.1, but this run has 0.5"):
        checkpoint.as_it_was(saved, asked, {"n_layer": "--n_layer", "dropout": "a.py:3"}, (), path)
    new = checkpoint.as_it_was(saved, asked, {"dropout": "--dropout"}, {"dropout"}, path)
    assert new == GPTConfig(**{**saved, "dropout": 0.1})
    with pytest.raises(UserError, match="n_head = 3"):
        checkpoint.as_it_was(saved, GPTConfig(n_head=3), {"n_head": "--n_head"}, {"n_head"}, path)
