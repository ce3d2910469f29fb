import random

import pytest
import torch

import checkpoint
from configurator import UserError
from model import GPT, GPTConfig

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


def test_any_damage_is_seen(tmp_path):
    path = checkpoint.save(state(1), tmp_path, keep=0, best_step=None)
    whole = path.read_bytes()
    assert checkpoint.is_whole(path)
    rng = random.Random(0)
    damaged = [whole[: rng.randrange(len(whole))] for _ in range(5)] + [b""]
    for _ in range(20):
        at = rng.randrange(len(whole))
        damaged.append(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :])
    for data in damaged:
        path.write_bytes(data)
        if checkpoint.is_whole(path):  # a flip in padding between records harms nothing
            loaded = checkpoint.load(path)
            assert all(
                torch.equal(a, b) for a, b in zip(loaded["model"].values(), state(1)["model"].values(), strict=True)
            )
            assert loaded["step"] == 1


def test_falls_back_to_the_newest_whole_one(tmp_path, capsys):
    assert checkpoint.newest_whole(tmp_path) is None
    for step in (1, 2, 3):
        path = checkpoint.save(state(step), tmp_path, keep=0, best_step=None)
    path.write_bytes(path.read_bytes()[:-100])
    assert checkpoint.step_of(checkpoint.newest_whole(tmp_path)) == 2
    assert "ckpt_000003.pt is damaged" in capsys.readouterr().err
    for path in checkpoint.find(tmp_path):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="no whole checkpoint"):
        checkpoint.newest_whole(tmp_path)
