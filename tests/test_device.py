import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TRAIN, call
from device import PEAK_FLOPS, check_tokens, code, git_commit, hardware, pick_device, pick_dtype

import distributed
from configurator import UserError

CPU, MPS = torch.device("cpu"), torch.device("mps")


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_freed_memory_is_kept_for_the_next_step():
    code = """
import resource, torch
from distributed import World
for device in (None, "cpu"):
    World(device)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(16 << 20)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    environment = {name: value for name, value in os.environ.items() if "MALLOC" not in name}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment)
    given_back, kept = (int(line) for line in done.stdout.split())
    assert kept < given_back / 2  # a small block may land in a large hole, which is then too small


def test_the_code_in_use(tmp_path):
    found = code()
    assert found["torch is"] == torch.__version__
    assert {"distributed.py has checksum", "configurator.py has checksum"} <= found.keys()
    assert not any(name.startswith(("conftest", "test_")) for name in found)


def test_devices():
    assert pick_device("cpu") == CPU
    if not torch.cuda.is_available():
        assert pick_device("auto").type in ("cpu", "mps")
    for wrong in ("gpu", "cuda:99", "meta", "cpu:1", "cuda:1000000000000"):
        with pytest.raises(UserError, match=wrong):
            pick_device(wrong)


def test_dtypes():
    assert pick_dtype("auto", CPU) == torch.float32
    assert pick_dtype("bfloat16", CPU) == torch.bfloat16


def test_no_peak_is_guessed(monkeypatch):
    assert hardware(CPU) == ("cpu", None)
    for name, peak in [("NVIDIA L4", 121e12), ("NVIDIA L40", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None)]:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert hardware(torch.device("cuda", 0)) == (name, peak)
    assert all(1e13 < peak < 1e16 for peak in PEAK_FLOPS.values())


def test_the_commit_is_that_of_this_code(monkeypatch, tmp_path):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    here = git_commit()
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    assert git_commit() == here


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_refused_on_mps(dtype):
    assert pick_dtype("auto", MPS) == pick_dtype("float32", MPS) == torch.float32
    with pytest.raises(UserError, match=f"'{dtype}'.* MPS,.*--dtype=float32"):
        pick_dtype(dtype, MPS)


def test_micro_batches_that_mps_cannot_do_are_refused(data_dir, tmp_path, monkeypatch):
    check_tokens(32, 1024, MPS)
    check_tokens(64, 1024, CPU)
    with pytest.raises(UserError, match=r"33 x seq_len 1024 = 33792 tokens.*--batch_size=32"):
        check_tokens(33, 1024, MPS)
    monkeypatch.setattr(distributed, "pick_device", lambda *args: MPS)
    flags = [f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'run'}", *TRAIN, "--batch_size=1025"]
    done = call("train_gpt2.py", *flags, "--total_batch_size=None")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--batch_size=1024" in done.stderr


def test_dtype_of_cards(monkeypatch):
    for computes, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, yes=computes: yes)
        assert pick_dtype("auto", torch.device("cuda", 0)) == dtype
