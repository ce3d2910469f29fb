import contextlib
import hashlib
import json
import os
import pickle
import shutil
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
from conftest import call, write_shard
from shards import foreign_kind, split_of

from configurator import UserError
from dataloader import Windows, read_meta
from fineweb import DataConfig, prepare
from tokenizer import get_tokenizer

ENC = get_tokenizer("gpt2")
TEXTS = {"val": "A text, validated. " * 60, "train": "Words to train on, and \U0001f642 more. " * 200}


def ids_of(split):
    return np.array([ENC.eot_token, *ENC.encode_ordinary(TEXTS[split])], "<u2")


def write_llmc(folder):
    train = ids_of("train")
    write_shard(folder / "fine_web_val_000000.bin", ids_of("val"))
    for i in range(3):
        write_shard(folder / f"fine_web_train_{i + 1:06}.bin", train[len(train) * i // 3 : len(train) * (i + 1) // 3])


def write_nanogpt(folder):
    for split in TEXTS:
        ids_of(split).tofile(folder / f"{split}.bin")


def write_npy(folder):
    for i, split in enumerate(TEXTS):
        np.save(folder / f"edufineweb_{split}_{i:06}.npy", ids_of(split))


MAKERS = [write_llmc, write_nanogpt, write_npy]


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "README.md").write_text("what it is")
    return folder


def convert(source, out, **options):
    prepare(DataConfig(shards=str(source), out_dir=str(out), **options))
    return json.loads((out / "meta.json").read_text())


def check(out, meta, size=10**8):
    """That what was made trains, and is the tokens of TEXTS."""
    assert (meta["tokenizer"], meta["vocab_size"]) == ("gpt2", 50257)
    for split, text in TEXTS.items():
        paths = sorted(out.glob(f"out_{split}_*.bin"))
        ids = [np.fromfile(path, "<u2", offset=1024) for path in paths]
        assert np.concatenate(ids).tolist() == ids_of(split).tolist()
        assert all(size <= len(part) < 2 * size for part in ids) or len(ids) == 1 or size == 10**8
        assert meta[f"{split}_tokens"] == len(ids_of(split))
        assert meta[f"{split}_bytes"] == len(text.encode())
        assert [*meta["shards"][split]] == [path.name for path in paths]
        assert len(Windows(str(out), split, 32))
    assert {path.name for path in out.iterdir()} == {"meta.json", *meta["shards"]["train"], *meta["shards"]["val"]}


@pytest.mark.parametrize("write", MAKERS)
@pytest.mark.parametrize("size", [10**8, 100])
def test_a_folder(source, tmp_path, write, size):
    write(source)
    before = sorted(path.name for path in source.iterdir())
    meta = convert(source, tmp_path / "out", shard_tokens=size)
    check(tmp_path / "out", meta, size)
    assert sorted(path.name for path in source.iterdir()) == before
    assert convert(source, tmp_path / "out", shard_tokens=size) == meta  # it is complete


@pytest.mark.parametrize("write", [write_nanogpt, write_npy])
def test_found_in_a_data_dir_it_is_named_with_what_converts_it(source, tmp_path, monkeypatch, write):
    write(source)
    done = call("train_gpt2.py", f"--data_dir={source}", f"--out_dir={tmp_path / 'run'}", "--device=cpu")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    said, command = done.stderr.strip().split("convert it: python fineweb.py ")
    assert ("nanoGPT" in said) == (write is write_nanogpt)
    assert call("fineweb.py", *command.split()).returncode == 0
    assert Windows(f"{source}_shards", "train", 32)


def test_names():
    assert split_of("a/val.bin") == split_of("x_val_000000.npy") == split_of("a_train_b_val_1.bin") == "val"
    assert split_of("train.bin") == split_of("a/train/x_train_000001.bin") == "train"
    assert not any(map(split_of, ("a/train/x.bin", "train.npy", "train_x.bin", "training.bin", "x_train_1.bin.tmp")))
    assert foreign_kind("x_train_000001.bin") is None
    assert foreign_kind("other.bin") is None


# From the hub


@pytest.fixture
def hub(source, monkeypatch):
    """A stand-in for Hugging Face, with what lies in `source` as the data set some/shards."""
    asked = []

    def dataset_info(self, repo, files_metadata):
        if repo != "some/shards":
            raise OSError(f"404 Client Error.\nRepository Not Found: {repo}")
        paths = sorted(path for path in source.rglob("*") if path.is_file())
        sums = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
        files = [
            SimpleNamespace(rfilename=str(path.relative_to(source)), blob_id=s[:9], lfs=SimpleNamespace(sha256=s))
            for path, s in zip(paths, sums, strict=True)
        ]
        return SimpleNamespace(sha="commit", siblings=files)

    def hf_hub_download(repo, name, *, repo_type, revision, local_dir):
        assert (repo, repo_type, revision) == ("some/shards", "dataset", "commit")
        asked.append(name)
        (local_dir / ".cache").mkdir(parents=True, exist_ok=True)
        (local_dir / name).parent.mkdir(parents=True, exist_ok=True)
        return shutil.copyfile(source / name, local_dir / name)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    return asked


@pytest.mark.parametrize("write", MAKERS)
def test_a_data_set(source, hub, tmp_path, write):
    (source / "deep").mkdir()
    write(source / "deep")
    check(tmp_path / "out", convert("some/shards", tmp_path / "out"))
    assert len(hub) == (4 if write is write_llmc else 2)


def test_some_of_its_files(source, hub, tmp_path):
    write_llmc(source)
    meta = convert("some/shards", tmp_path / "out", exclude="*_train_000002.bin, *3.bin")
    assert sorted(hub) == ["fine_web_train_000001.bin", "fine_web_val_000000.bin"]
    assert len(meta["shards"]["train"]) == 1


class Killed(BaseException):
    pass


def test_killed_anywhere_it_goes_on(source, hub, tmp_path, monkeypatch):
    write_llmc(source)
    convert("some/shards", tmp_path / "straight" / "out", shard_tokens=200)
    real, left, deaths, out = os.replace, 0, 0, tmp_path / "out"

    def replace(*args):
        nonlocal left
        left -= 1
        if left == 0:
            raise Killed
        real(*args)
        left -= 1
        if left == 0:
            raise Killed

    monkeypatch.setattr(os, "replace", replace)
    hub.clear()
    while not (out / "meta.json").exists():
        left = 3 + deaths % 6
        with contextlib.suppress(Killed):
            convert("some/shards", out, shard_tokens=200)
            break
        deaths += 1
        assert deaths < 50
        if (out / "progress.json").exists() and not (out / "meta.json").exists():
            with pytest.raises(UserError, match="not finished"):
                read_meta(str(out))
    assert deaths > 3
    assert len(hub) < 4 + deaths  # what is done is not downloaded again
    (out / "progress.json").unlink(missing_ok=True)  # a kill after meta.json leaves these two
    shutil.rmtree(out / "download", ignore_errors=True)
    straight = {path.name: path.read_bytes() for path in (tmp_path / "straight" / "out").iterdir()}
    assert {path.name: path.read_bytes() for path in out.iterdir()} == straight


def test_a_data_set_that_changes_between_is_noticed(source, hub, tmp_path, monkeypatch):
    write_llmc(source)
    whole = (source / "fine_web_train_000002.bin").read_bytes()
    (source / "fine_web_train_000002.bin").write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"000002.bin: .*cut or damaged"):
        convert("some/shards", tmp_path / "out")
    (source / "fine_web_train_000002.bin").write_bytes(whole)
    with pytest.raises(UserError, match="other source files"):
        convert("some/shards", tmp_path / "out")


def test_a_download_that_is_damaged_is_made_again(source, hub, tmp_path, monkeypatch):
    write_llmc(source)
    real = huggingface_hub.hf_hub_download

    def damaged(*args, **kwargs):
        path = real(*args, **kwargs)
        with open(path, "r+b") as file:
            file.seek(1500)
            file.write(b"\0")
        return path

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", damaged)
    with pytest.raises(UserError, match="sha256"):
        convert("some/shards", tmp_path / "out")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", real)
    check(tmp_path / "out", convert("some/shards", tmp_path / "out"))


def test_no_network_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.hf_api.constants, "ENDPOINT", "http://127.0.0.1:9")
    done = call("fineweb.py", "--shards=some/shards", f"--out_dir={tmp_path / 'out'}")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "--shards=some/shards" in done.stderr
    assert not (tmp_path / "out").exists()


# Mistakes


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("val.bin", b"odd", "3 bytes"),
        ("val.bin", b"", "val.bin"),
        ("val.bin", None, "no val file there"),
        ("train.bin", np.full(9, 50257, "<u2").tobytes(), "id 50257, but --tokenizer has 50,257 ids"),
        ("meta.pkl", pickle.dumps({}), "characters"),
        ("x_val_000000.bin", b"", "there are llm.c's shards and nanoGPT's"),
    ],
)
def test_files_that_are_not_what_they_seem(source, tmp_path, name, content, message):
    write_nanogpt(source)
    if content is None:
        (source / name).unlink()
    else:
        (source / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        convert(source, tmp_path / "out")


@pytest.mark.parametrize("content", [b"not numpy", b"", np.zeros((2, 2), "<u2"), np.zeros(4), np.array([None])])
def test_arrays_that_are_not_tokens(source, tmp_path, content):
    write_npy(source)
    if isinstance(content, bytes):
        (source / "edufineweb_train_000001.npy").write_bytes(content)
    else:
        np.save(source / "edufineweb_train_000001.npy", content)
    with pytest.raises(UserError, match=r"train_000001\.npy: "):
        convert(source, tmp_path / "out")


@pytest.mark.parametrize("option", [{"val_fraction": 0.1}, {"join": True}, {"part": "1/2"}, {"separator": "x"}])
def test_options_of_text(option):
    with pytest.raises(ValueError, match="shards are tokens already"):
        DataConfig(shards="a", out_dir="b", **option)
