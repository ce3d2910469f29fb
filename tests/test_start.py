"""What a run starts from; most of it is seen in test_train.py and test_resume.py."""

from types import SimpleNamespace

import pytest
import torch
from start import check_options, make_plan, merge

from configurator import UserError
from model import GPTConfig
from train_gpt2 import TrainConfig

TINY = GPTConfig(block_size=8, vocab_size=32, n_layer=1, n_head=2, n_embd=8)


def test_merge():
    saved = {**vars(TINY), "dropout": 0.5}
    del saved["qk_norm"]  # a flag that came later
    path = "ckpt_000001.pt"
    assert merge(saved, GPTConfig(), {}, (), path) == GPTConfig(**saved)
    asked = GPTConfig(dropout=0.1, n_layer=1)
    with pytest.raises(UserError, match=r"a.py:3: dropout = 0.1, but this run has 0.5"):
        merge(saved, asked, {"n_layer": "--n_layer", "dropout": "a.py:3"}, (), path)
    new = merge(saved, asked, {"dropout": "--dropout"}, {"dropout"}, path)
    assert new == GPTConfig(**{**saved, "dropout": 0.1})
    with pytest.raises(UserError, match="n_head = 3"):
        merge(saved, GPTConfig(n_head=3), {"n_head": "--n_head"}, {"n_head"}, path)


@pytest.mark.parametrize(
    ("size", "near"), [(100, "use --total_batch_size=96 or --total_batch_size=144"), (47, "use --total_batch_size=48")]
)
def test_the_nearest_sizes_of_a_step_are_named(size, near):
    config = TrainConfig(seq_len=8, batch_size=2, total_batch_size=size)
    with pytest.raises(UserError, match=f"batch_size 2 x seq_len 8 x 3 processes; {near}$"):
        check_options(config, TINY, {}, None, SimpleNamespace(size=3, device=torch.device("cpu")))


@pytest.mark.parametrize(
    ("asked", "steps"),
    [({}, 5), ({"max_steps": 19073}, 715), ({"warmup_steps": 7}, 7), ({"warmup_fraction": 0.2, "warmup_steps": 7}, 20)],
)
def test_warm_up_is_short_in_a_short_run(asked, steps):
    config = TrainConfig(**{"seq_len": 8, "batch_size": 2, "total_batch_size": 16, "max_steps": 100, **asked})
    assert make_plan(config, 10**6, SimpleNamespace(size=1)).warmup_steps == steps
