import itertools
import json
import os
import random
import shutil
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_shard

import dataloader
from configurator import UserError
from dataloader import DataGuard, Windows, data_tokenizer, permute, read_meta, step_windows, train_batches, val_batches

T = 8
CPU = torch.device("cpu")


@pytest.fixture
def shards(tmp_path):
    """Shards of unequal lengths whose tokens are their own positions in the whole; one too short for a window."""
    first = 0
    for i, n in enumerate([97, 5, 250, 64, 65]):
        write_shard(tmp_path / f"x_train_{i:06d}.bin", range(first, first + n))
        first += n
    write_shard(tmp_path / "x_val_000000.bin", range(1000, 1100))
    return tmp_path


def test_windows_tile_each_shard(shards):
    windows = Windows(str(shards), "train", T)
    brute = []
    first = 0
    for n in [97, 5, 250, 64, 65]:
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
    whole = permute(index, size, 1337, 3)
    assert [int(permute(index[i : i + 1], size, 1337, 3)[0]) for i in range(5)] == whole.tolist()
    assert (whole < size).all()
    assert len(set(whole.tolist())) == 5


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_each_window_once_an_epoch(shards, world_size, batch_size):
    """As llm.c's loader test asks: over the ranks together every token comes exactly once in each epoch, and the order
    of the next epoch differs. Steps that straddle two epochs included."""
    windows = Windows(str(shards), "train", T)
    rows = 2 * batch_size * world_size
    epochs = 3
    steps = -(-epochs * len(windows) // rows)
    ranks = [train_batches(windows, 1, rows, batch_size, r, world_size, CPU, 1) for r in range(world_size)]
    order = []
    for _ in range(steps):
        micro = [[next(batches) for _ in range(2)] for batches in ranks]
        for m, r in itertools.product(range(2), range(world_size)):
            x, y = micro[r][m]
            assert x.shape == (batch_size, T)
            assert torch.equal(y, x + 1)
            order += x[:, 0].tolist()
    whole = sorted(windows.read(np.arange(len(windows)))[0][:, 0].tolist())
    passes = [order[e * len(whole) : (e + 1) * len(whole)] for e in range(epochs)]
    for one in passes:
        assert sorted(one) == whole
    assert passes[0] != passes[1] != passes[2] != passes[0]
    assert passes[0] != whole
    for batches in ranks:
        batches.close()


def test_global_batch_is_the_same_on_any_number_of_processes(shards):
    windows = Windows(str(shards), "train", T)

    def step_five(world_size, batch_size):
        got = []
        ranks = [train_batches(windows, 7, 12, batch_size, r, world_size, CPU, 5) for r in range(world_size)]
        for _ in range(12 // (world_size * batch_size)):
            got += [next(batches)[0] for batches in ranks]
        return torch.cat(got)

    straight = train_batches(windows, 7, 12, 12, 0, 1, CPU, 1)
    fifth = list(itertools.islice(straight, 5))[4][0]
    for world_size, batch_size in [(1, 12), (1, 1), (2, 3), (3, 2), (4, 3), (4, 1)]:
        assert torch.equal(step_five(world_size, batch_size), fifth)


def test_a_step_may_hold_several_epochs():
    counts = np.bincount(step_windows(1, 35, 10, seed=0), minlength=10)
    assert counts.sum() == 35
    assert counts.min() >= 3
    assert counts.max() <= 4


@pytest.mark.parametrize(("val_tokens", "count"), [(T, 1), (5 * T + 3, 5), (10**9, 12)])
def test_val_windows_are_the_same_whatever_the_batch(shards, val_tokens, count):
    windows = Windows(str(shards), "val", T)
    for world_size, batch_size in [(1, 1), (1, 5), (2, 2), (3, 4), (4, 16)]:
        got = [
            x for r in range(world_size) for x, _ in val_batches(windows, val_tokens, batch_size, r, world_size, CPU)
        ]
        starts = sorted(torch.cat(got)[:, 0].tolist())
        assert starts == [1000 + i * T for i in range(count)]


def test_damaged_shards_are_refused(tmp_path):
    good = tmp_path / "x_train_000000.bin"
    write_shard(good, range(100))
    data = good.read_bytes()
    for damaged in (data[:-2], data + b"\0\0", b"\0" + data[1:], data[:8], b"", np.arange(300).tobytes()):
        good.write_bytes(damaged)
        with pytest.raises(UserError, match="x_train_000000"):
            Windows(str(tmp_path), "train", T)


def test_missing_data_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        read_meta(str(tmp_path / "none"))
    assert read_meta(str(tmp_path)) == {}
    with pytest.raises(UserError, match="no train shards"):
        Windows(str(tmp_path), "train", T)
    write_shard(tmp_path / "x_train_000000.bin", range(T))
    with pytest.raises(UserError, match="the largest has 8"):
        Windows(str(tmp_path), "train", T)


def test_the_datas_tokenizer(tmp_path):
    assert data_tokenizer(str(tmp_path), {}, 50304) == "gpt2"
    assert data_tokenizer(str(tmp_path), {}, 1000) is None
    assert data_tokenizer(str(tmp_path), {"tokenizer": "bytes"}, 257) == "bytes"
    (tmp_path / "own.json").write_text("{}")
    assert data_tokenizer(str(tmp_path), {"tokenizer": "own.json"}, 300) == "{}"
    with pytest.raises(UserError, match="gone"):
        data_tokenizer(str(tmp_path), {"tokenizer": "gone.json"}, 300)
    (tmp_path / "meta.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        read_meta(str(tmp_path))


def test_more_shards_than_open_files(tmp_path):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for i in range(150):
        write_shard(tmp_path / f"x_train_{i:06d}.bin", [random.randrange(9) for _ in range(20)])
    os.close(free := os.dup(0))  # the lowest number that a file could get
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 50, hard))
    try:
        assert len(Windows(str(tmp_path), "train", T)) == 300
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_more_shards_than_maps(tmp_path, monkeypatch):
    """Of any number of shards some stay mapped, and all can be read, in any order."""
    for i in range(40):
        write_shard(tmp_path / f"x_train_{i:06d}.bin", [random.randrange(9) for _ in range(20)])
    order = np.random.default_rng(0).permutation(80)
    want = [batch.tolist() for batch in Windows(str(tmp_path), "train", T).read(order)]
    monkeypatch.setattr(dataloader, "MAX_MAPS", 3)
    windows = Windows(str(tmp_path), "train", T)
    assert [batch.tolist() for batch in windows.read(order)] == want
    if sys.platform == "linux":
        assert Path("/proc/self/maps").read_text().count(f"{tmp_path}/x_train_") == 3


@pytest.mark.parametrize("name", ["my_train_set", "val_val_x", "[x]"])
def test_a_folder_whose_name_has_a_splits_name_in_it(tmp_path, name):
    (tmp_path / name).mkdir()
    write_shard(tmp_path / name / f"{name}_train_000001.bin", range(100))
    write_shard(tmp_path / name / f"{name}_val_000000.bin", range(100, 200))
    assert [len(Windows(str(tmp_path / name), split, T).paths) for split in ("train", "val")] == [1, 1]


@pytest.mark.parametrize(
    "changed",
    [
        {"vocab_size": 0}, {"vocab_size": 2**40}, {"val_bytes": "1"}, {"val_words": -1}, {"val_tokens": None},
        {"shards": 1}, {"shards": None}, {"shards": {"val": 1}}, {"shards": {"val": {"a": 1}}},
        {"shards": {"val": {"a": [1, "2"]}}}, {"shards": {"val": {"a": [1]}}},
    ],
)  # fmt: skip
def test_meta_that_is_damaged(tmp_path, changed):
    meta = {"tokenizer": "bytes", "vocab_size": 257, "train_tokens": 9, "val_tokens": 9, **changed}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match=next(iter(changed))):
        read_meta(str(tmp_path))


def test_files_of_a_data_folder_that_cannot_be_read(tmp_path):
    (tmp_path / "meta.json").mkdir()
    with pytest.raises(UserError, match=r"meta\.json"):
        read_meta(str(tmp_path))
    (tmp_path / "own.json").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"own\.json"):
        data_tokenizer(str(tmp_path), {"tokenizer": "own.json"}, 300)
    (tmp_path / "own.json").unlink()
    (tmp_path / "own.json").mkdir()
    with pytest.raises(UserError, match=r"own\.json"):
        data_tokenizer(str(tmp_path), {"tokenizer": "own.json"}, 300)


def test_data_whose_preparation_is_not_finished_is_refused(tmp_path):
    """With the command that finishes it."""
    write_shard(tmp_path / "x_train_000000.bin", range(100))
    (tmp_path / "progress.json").write_text(json.dumps({"command": "python fineweb.py '--files=a b'"}))
    with pytest.raises(UserError, match=r"not finished; finish it: python fineweb\.py '--files=a b'$"):
        read_meta(str(tmp_path))
    for content in (b"{}", b"\xff", b"", b"{"):
        (tmp_path / "progress.json").write_bytes(content)
        with pytest.raises(UserError, match=r"run its fineweb\.py command again"):
            read_meta(str(tmp_path))
    (tmp_path / "meta.json").write_text(json.dumps({"tokenizer": "bytes", "vocab_size": 257}))
    assert read_meta(str(tmp_path))["vocab_size"] == 257  # killed between its last two steps


# Data that changes


@pytest.fixture(params=[True, False], ids=["checksums", "no checksums"])
def guarded(tmp_path, request):
    """(folder of a large and a small train shard, its meta.json with checksums or without)."""
    (tmp_path / "data").mkdir()
    names = {"x_train_000000.bin": (1 << 20) + 5000, "x_train_000001.bin": 300}
    shards = {}
    for name, count in names.items():
        tokens = np.arange(count, dtype="<u2")
        write_shard(tmp_path / "data" / name, tokens)
        shards[name] = [count, zlib.crc32(tokens.tobytes())]
    return tmp_path / "data", {"shards": {"train": shards}} if request.param else {}


def watch(guarded, saved=None):
    guard = DataGuard(str(guarded[0]), ["train"], guarded[1], saved or {})
    guard.check()
    return guard


def overwrite(path, how):
    """New tokens, or the same ones."""
    status, data = path.stat(), bytearray(path.read_bytes())
    if how == "99%":  # of a large shard, all but 16 pages spread over it
        pages = np.linspace(0, len(data) - 1024 - 4096, 16).astype(int)
        kept = [data[1024 + page : 1024 + page + 4096] for page in pages]
        data[1024:] = bytes(len(data) - 1024)
        for page, content in zip(pages, kept, strict=True):
            data[1024 + page : 1024 + page + 4096] = content
    elif how == "one token":
        data[-2] ^= 1
    elif how == "longer":
        data += b"12"
    path.write_bytes(data)
    later = status.st_mtime_ns + (0 if how == "one token, same time" else 10**9)
    os.utime(path, ns=(later, later))


def test_what_a_checkpoint_keeps_of_the_data(guarded):
    folder, meta = guarded
    record = watch(guarded).record
    assert list(record) == ["train"]
    for name, count in (("x_train_000000.bin", (1 << 20) + 5000), ("x_train_000001.bin", 300)):
        status = (folder / name).stat()
        checksum = zlib.crc32(np.arange(count, dtype="<u2").tobytes()) if meta else None
        assert record["train"][name] == {
            "tokens": count, "size": status.st_size, "mtime_ns": status.st_mtime_ns, "crc32": checksum,
        }  # fmt: skip


def test_the_same_data_between_two_runs(guarded, tmp_path):
    saved = json.loads(json.dumps(watch(guarded).record))
    assert watch(guarded, saved).record == saved
    shutil.copytree(guarded[0], tmp_path / "copy")  # as cp -p
    assert watch((tmp_path / "copy", guarded[1]), saved).record == saved
    assert (
        watch(guarded, {"train": dict.fromkeys(saved["train"], 7), "val": {"x": 7}}).record["train"] == saved["train"]
    )


@pytest.mark.parametrize("how", ["longer", "one token", "touched", "new", "gone", "prepared anew"])
def test_data_that_changed_between_two_runs(guarded, how):
    folder, meta = guarded
    saved, path = watch(guarded).record, folder / "x_train_000001.bin"
    if how == "gone":
        path.unlink()
    elif how == "new":
        path = folder / "x_train_000002.bin"
        write_shard(path, range(9))
    else:
        overwrite(path, how)
    if how == "prepared anew" and meta:
        meta["shards"]["train"][path.name][1] += 1
    if meta and how in ("one token", "touched"):  # looked at by its checksum, behind the first step
        guard = watch(guarded, saved)
        guard.start_reading()
        guard.reader.join()
        assert bool(guard.problem) == (how == "one token")
        return
    with pytest.raises(UserError, match=path.name) as error:
        watch(guarded, saved)
    assert ("cp -p" in str(error.value)) == (not meta and how in ("one token", "touched", "prepared anew"))


@pytest.mark.parametrize("how", ["longer", "one token", "99%", "touched", "new", "gone"])
@pytest.mark.parametrize("name", ["x_train_000000.bin", "x_train_000001.bin"])
def test_data_that_changes_during_a_run(guarded, how, name):
    folder, meta = guarded
    guard, path = watch(guarded), folder / name
    guard.start_reading()
    guard.reader.join()
    guard.check()
    if how == "gone":
        path.unlink()
    elif how == "new":
        path = folder / "x_train_000002.bin"
        write_shard(path, range(9))
    elif how == "99%" and name == "x_train_000001.bin":
        return
    else:
        overwrite(path, how)
    if meta and how == "touched":
        guard.check()
        assert guard.record["train"][name]["mtime_ns"] == path.stat().st_mtime_ns
        return
    with pytest.raises(UserError, match=path.name):
        guard.check()


def test_all_tokens_are_compared_with_their_checksum_once_behind_the_first_step(guarded, monkeypatch):
    """Also those of a shard whose size and time are as they were."""
    folder, meta = guarded
    saved, path = watch(guarded).record, folder / "x_train_000000.bin"
    status = path.stat()
    overwrite(path, "99%")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    threads, real = [], dataloader.shard_checksum
    monkeypatch.setattr(
        dataloader, "shard_checksum", lambda path: threads.append(threading.current_thread()) or real(path)
    )
    guard = watch(guarded, saved)
    guard.check()
    assert not threads
    for _ in range(2):
        guard.start_reading()
        guard.reader.join()
    assert threads == [guard.reader] * bool(meta)  # the first shard that is wrong is enough
    if meta:
        with pytest.raises(UserError, match=r"x_train_000000\.bin.*checksum"):
            guard.check()


def test_a_shard_that_cannot_be_read_is_a_line(guarded):
    if guarded[1]:
        guard = watch(guarded)
        (guarded[0] / "x_train_000001.bin").unlink()
        (guarded[0] / "x_train_000001.bin").mkdir()
        guard.start_reading()
        guard.reader.join()
        with pytest.raises(UserError, match=r"x_train_000001\.bin: Is a directory"):
            guard.check()


@pytest.mark.parametrize(("device", "pinned"), [("cuda", True), ("mps", False), ("cpu", False)])
def test_how_batches_are_copied(shards, monkeypatch, device, pinned):
    """Pinned and not waited for on CUDA alone, and from contiguous rows: others are pinned in vain."""
    copies, pins = [], []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pins.append(x.data_ptr()) or x)
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *args, non_blocking: copies.append((x, non_blocking)) or x)
    batches = train_batches(Windows(str(shards), "train", T), 1, 6, 3, 0, 1, torch.device(device), 1)
    x, y = next(batches)
    batches.close()
    assert torch.equal(y, x + 1)
    assert x.is_contiguous() and y.is_contiguous()  # noqa: PT018
    assert [non_blocking for _, non_blocking in copies] == [pinned] * 2
    assert {x.data_ptr(), y.data_ptr()} <= set(pins) if pinned else not pins
