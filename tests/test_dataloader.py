import itertools
import os
import random
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_shard

import dataloader
from configurator import UserError
from dataloader import Windows, check_data, fingerprints, permute, read_meta, train_batches, val_batches

T = 8
CPU = torch.device("cpu")
LENGTHS = [97, 5, 250, 64, 65]  # one too short for a window


@pytest.fixture
def shards(tmp_path):
    """Shards of unequal lengths whose tokens are their own positions in the whole."""
    first = 0
    for i, n in enumerate(LENGTHS):
        write_shard(tmp_path / f"x_train_{i:06d}.bin", range(first, first + n))
        first += n
    write_shard(tmp_path / "x_val_000000.bin", range(1000, 1100))
    return tmp_path


def test_windows_tile_each_shard(shards):
    windows, brute, first = Windows(str(shards), "train", T), [], 0
    for n in LENGTHS:
        brute += [first + i * T for i in range(n) if i * T + T + 1 <= n]
        first += n
    x, y = windows.read(np.arange(len(windows)))
    assert x[:, 0].tolist() == brute
    assert torch.equal(x, torch.tensor(brute)[:, None] + torch.arange(T))
    assert torch.equal(y, x + 1)


@pytest.mark.parametrize("size", [1, 2, 3, 16, 17, 1000, 4097])
def test_permute_is_a_shuffle(size):
    seen = [tuple(permute(np.arange(size), size, seed, epoch)) for seed in (1, 2) for epoch in (0, 1)]
    for p in seen:
        assert sorted(p) == list(range(size))
    if size > 100:
        assert len(set(seen)) == 4
        for p in seen:  # like a random permutation: about one fixed point, neighbours far apart
            assert sum(i == j for i, j in enumerate(p)) < 8
            assert np.mean(np.abs(np.diff(p))) == pytest.approx(size / 3, rel=0.1)


def test_permute_one_by_one_equals_all_at_once_at_any_size():
    size = 10**13
    index = np.array([0, 1, 5, 10**12, size - 1])
    whole = permute(index, size, 1337, 3).tolist()
    assert [int(permute(index[i : i + 1], size, 1337, 3)[0]) for i in range(5)] == whole
    assert (max(whole) < size, len(set(whole))) == (True, 5)


@pytest.mark.parametrize("rows", [6, 150])
def test_each_window_once_an_epoch(shards, rows):
    """In another order in each epoch. Batches straddle two epochs, or hold several."""
    windows, order = Windows(str(shards), "train", T), []
    batches = train_batches(windows, 1, rows, 3, 0, 1, CPU, 1)
    while len(order) < 3 * len(windows):
        x, y = next(batches)
        assert x.shape == (3, T)
        assert torch.equal(y, x + 1)
        order += x[:, 0].tolist()
    whole = windows.read(np.arange(len(windows)))[0][:, 0].tolist()
    epochs = [order[e * len(whole) : (e + 1) * len(whole)] for e in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [whole] * 3
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0] != whole


def test_global_batch_is_the_same_on_any_number_of_processes(shards):
    windows = Windows(str(shards), "train", T)
    fifth = next(itertools.islice(train_batches(windows, 7, 12, 12, 0, 1, CPU, 1), 4, None))[0]
    for world_size, batch_size in [(1, 12), (1, 1), (2, 3), (3, 2), (4, 3), (4, 1)]:
        ranks = [train_batches(windows, 7, 12, batch_size, r, world_size, CPU, 5) for r in range(world_size)]
        got = [next(batches)[0] for _ in range(12 // (world_size * batch_size)) for batches in ranks]
        assert torch.equal(torch.cat(got), fifth)


@pytest.mark.parametrize(("val_tokens", "count"), [(T, 1), (5 * T + 3, 5), (10**9, 12)])
def test_val_windows_are_the_same_whatever_the_batch(shards, val_tokens, count):
    windows = Windows(str(shards), "val", T)
    for size, batch_size in [(1, 1), (1, 5), (2, 2), (3, 4), (4, 16)]:
        ranks = [list(val_batches(windows, val_tokens, batch_size, r, size, CPU)) for r in range(size)]
        assert len({len(batches) for batches in ranks}) == 1  # all ranks must meet as often
        starts = torch.cat([x for batches in ranks for x, _ in batches])[:, 0].tolist()
        assert sorted(starts) == [1000 + i * T for i in range(count)]


@pytest.mark.parametrize(("device", "pinned"), [("cuda", True), ("mps", False), ("cpu", False)])
def test_how_batches_are_copied(shards, monkeypatch, device, pinned):
    """Pinned and not waited for on CUDA alone, and from contiguous rows: others are pinned in vain."""
    waits, pins, device = [], [], torch.device(device)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pins.append(x.data_ptr()) or x)
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *args, non_blocking: waits.append(not non_blocking) or x)
    train, val = (Windows(str(shards), split, T) for split in ("train", "val"))
    for batches in (train_batches(train, 1, 6, 3, 0, 1, device, 1), val_batches(val, 99, 3, 0, 1, device)):
        x, y = next(batches)
        batches.close()
        assert x.is_contiguous() and y.is_contiguous()  # noqa: PT018
        assert {x.data_ptr(), y.data_ptr()} <= set(pins) if pinned else not pins
    assert waits == [not pinned] * 4


def test_reading_goes_on_while_a_batch_is_used(shards):
    """In another thread, a few batches ahead; an error in it is raised where its batch is due."""
    windows, threads, ready = Windows(str(shards), "val", T), [], threading.Event()
    read = windows.read

    def watched(indices):
        threads.append(threading.get_ident())
        if len(threads) == 3:
            ready.set()
            raise UserError("the third")
        return read(indices)

    windows.read = watched
    batches = val_batches(windows, 99, 1, 0, 1, CPU)
    assert len([next(batches), next(batches)]) == 2
    assert ready.wait(10)
    assert threading.get_ident() not in threads
    with pytest.raises(UserError, match="the third"):
        next(batches)


# ---- A folder of shards


def test_missing_data_is_one_clear_line(tmp_path, monkeypatch):
    configs = tmp_path / "code" / "config" / "data"
    configs.mkdir(parents=True)
    (configs / "._a.py").write_bytes(b"\xff\xfe")  # as macOS leaves beside files: not text
    (configs / "a.py").write_text('out_dir = "data/a"')
    with monkeypatch.context() as patch:
        patch.setattr(dataloader, "__file__", str(tmp_path / "code" / "dataloader.py"))
        assert dataloader.command_for("data/a") == "python fineweb.py config/data/a.py"
    for folder, command in (("data/shakespeare/", "config/data/shakespeare.py"), (tmp_path / "none", "--files=")):
        with pytest.raises(UserError, match=f"{folder}: No such file or directory; prepare it: python .*{command}"):
            read_meta(str(folder))
    for split, line in (("train", "no train shards"), ("val", r"no val shards .*--val_interval=0")):
        with pytest.raises(UserError, match=line):
            Windows(str(tmp_path), split, T)
    write_shard(path := tmp_path / "x_train_000000.bin", range(T))
    with pytest.raises(UserError, match="the largest has 8"):
        Windows(str(tmp_path), "train", T)
    with pytest.raises(UserError, match=f"data_dir {path}: Not a directory$"):
        read_meta(str(path))
    assert read_meta(str(tmp_path)) == {}
    monkeypatch.setattr(os, "listdir", lambda folder: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(UserError, match=f"data_dir {tmp_path}: Permission denied$"):
        read_meta(str(tmp_path))


@pytest.mark.parametrize("content", ["[]", "7", '{"tokenizer": "bytes"}', None])
def test_a_damaged_meta(tmp_path, content):
    path = tmp_path / "meta.json"
    path.mkdir() if content is None else path.write_text(content)
    with pytest.raises(UserError, match=r"meta\.json: .*; prepare the data again"):
        read_meta(str(tmp_path))


def test_data_whose_preparation_is_not_finished_is_refused(tmp_path):
    (tmp_path / "progress.json").write_text("{}")
    with pytest.raises(UserError, match=r"not finished; run its fineweb\.py command again"):
        read_meta(str(tmp_path))
    (tmp_path / "meta.json").write_text('{"tokenizer": "bytes", "vocab_size": 257}')
    assert read_meta(str(tmp_path))["vocab_size"] == 257  # killed between its last two steps


def test_the_datas_tokenizer(tmp_path, monkeypatch):
    def tokenizer(meta, vocab_size=300):
        return dataloader.data_tokenizer("data", meta and {"tokenizer": meta}, vocab_size)

    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("own.json").write_text("another")
    assert (tokenizer({}, 50304), tokenizer({}, 1000), tokenizer("bytes")) == ("gpt2", None, "bytes")
    with pytest.raises(UserError, match=r"data/own\.json: No such file"):
        tokenizer("own.json")
    Path("data/own.json").write_text("{}")
    assert tokenizer("own.json") == "{}"
    for outside in ("../own.json", str(tmp_path / "own.json")):
        with pytest.raises(UserError, match=r"own\.json is outside of data; copy it there"):
            tokenizer(outside)


def test_any_number_of_shards(tmp_path, monkeypatch):
    """More than a process may have open files or maps: some stay mapped, and all can be read, in any order."""
    resource = pytest.importorskip("resource")
    for i in range(150):
        write_shard(tmp_path / f"x_train_{i:06d}.bin", [random.randrange(9) for _ in range(20)])
    order = np.random.default_rng(0).permutation(300)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    os.close(free := os.dup(0))  # the lowest number that a file could get
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 50, hard))
    try:
        want = [batch.tolist() for batch in Windows(str(tmp_path), "train", T).read(order)]
        monkeypatch.setattr(dataloader, "MAX_MAPS", 3)
        windows = Windows(str(tmp_path), "train", T)
        assert [batch.tolist() for batch in windows.read(order)] == want
        if sys.platform == "linux":
            assert Path("/proc/self/maps").read_text().count(f"{tmp_path}/x_train_") == 3
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


TOKENS = np.arange((1 << 20) + 5000) % 251
CHANGED = np.concatenate([TOKENS[:500_000], np.full(105_000, 3), TOKENS[605_000:]])  # a tenth


def test_data_that_changed_is_refused_by_name(tmp_path):
    def prints(tokens, crc=7):
        write_shard(path := tmp_path / "x_train_000000.bin", tokens)
        return fingerprints(str(tmp_path), {"shards": {"train": {path.name: [0, crc]}}})

    saved, others = prints(TOKENS), "has other tokens"
    check_data("data", saved, prints(TOKENS))
    for before, now, change in (
        (saved, prints(TOKENS[:-1]), others), (saved, prints(CHANGED), others), (saved, prints(TOKENS, crc=8), others),
        (saved, {}, "is gone"), ({}, saved, "is new"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"data/x_train_000000.bin {change} since this run began"):
            check_data("data", before, now)
