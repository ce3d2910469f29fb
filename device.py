"""The device under a process, what it can do and how fast, and what a run records of it and of the code."""

import ctypes
import os
import platform
import re
import subprocess
import sys
import zlib
from datetime import UTC, datetime
from pathlib import Path

import torch

from configurator import UserError

# Dense tensor-core peak in FLOP/s by the name that torch reports, from NVIDIA's data sheets: bf16, on V100 and T4 fp16.
PEAK_FLOPS = {
    "NVIDIA B200": 2250e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA A40": 150e12,
    "NVIDIA A10G": 70e12,
    "NVIDIA L4": 121e12,
    "Tesla V100-SXM2-32GB": 125e12,
    "Tesla V100-SXM2-16GB": 125e12,
    "Tesla T4": 65e12,
    "NVIDIA GeForce RTX 5090": 210e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA GeForce RTX 3090": 71e12,
}


def pick_device(device: str, local_rank: int = 0) -> torch.device:
    """'auto', 'cpu', 'cuda', 'cuda:1', 'mps' -> a torch.device; a plain 'cuda' is this process's own card."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?|mps", device):
        raise UserError(f"device = {device!r}, but it must be 'auto', 'cpu', 'cuda', 'cuda:N' or 'mps'")
    picked = torch.device(device)
    if picked.type == "cuda":
        index = local_rank if picked.index is None else picked.index
        if index >= torch.cuda.device_count():
            raise UserError(f"device = {device!r}: card {index} wanted, but torch sees {torch.cuda.device_count()}")
        return torch.device("cuda", index)
    if picked.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device = 'mps', but this machine has none; use 'auto' or 'cpu'")
    return picked


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """auto: bfloat16 on the cards that compute in it, float16 on older ones, float32 elsewhere."""
    if device.type == "mps" and dtype in ("bfloat16", "float16"):
        # https://github.com/pytorch/pytorch/issues/195910
        raise UserError(f"dtype = {dtype!r}: on MPS, causal attention in it sees the future; use --dtype=float32")
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def is_bfloat16_cpu(device: torch.device) -> bool:
    """Whether this is a CPU that computes products in bfloat16. Training leaves them in float32 all the same, unless
    asked: a run's losses shall not depend on which CPU it is on."""
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def autocast(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """A context in which matrix products are computed in `dtype`; in float32 it changes nothing."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def check_tokens(batch_size: int, seq_len: int, device: torch.device) -> None:
    """Raises UserError if the device computes wrong gradients for a micro-batch of this size."""
    if device.type == "mps" and batch_size * seq_len > 32768:  # https://github.com/pytorch/pytorch/issues/177116
        tokens = f"batch_size {batch_size} x seq_len {seq_len} = {batch_size * seq_len} tokens"
        raise UserError(f"{tokens}: above 32768 MPS computes wrong gradients; use --batch_size={32768 // seq_len}")


def hardware(device: torch.device) -> tuple[str, float | None]:
    """The device's name and its peak FLOP/s; None if the table above does not have it: a guess would mislead."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return name, PEAK_FLOPS.get(name)


def peak_memory(device: torch.device) -> float | None:
    """The most memory that tensors took so far, in GB (10^9 bytes); None if the device does not count it."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None


def keep_freed_memory() -> None:
    """Let glibc keep large blocks that are freed for the next step. It would give them back to the system, which hands
    them out page by page, filled with zeros: a third of a CPU step of 124M, more where logits outweigh the model."""
    libc, m_trim_threshold, m_mmap_max = ctypes.CDLL(None), -1, -4  # as in malloc.h
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, -1)  # never


def make_deterministic(device: torch.device, on_gpus: bool) -> None:
    """Let the same step give the same bits: always on a CPU, on a GPU if asked for, as it is slower there."""
    if device.type == "cpu":
        torch.set_deterministic_debug_mode("error")  # else compiled code adds up threads' results in any order
    elif on_gpus:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs it
        torch.use_deterministic_algorithms(True)  # also keeps the compiler from choosing kernels by their speed
    torch.utils.deterministic.fill_uninitialized_memory = False  # it finds bugs, but costs time


def machine(device: torch.device, dtype: torch.dtype) -> dict:
    """What a run records of where, when and with which code it runs."""
    return dict(
        commit=git_commit(), torch=torch.__version__, python=platform.python_version(), hardware=hardware(device)[0],
        dtype=str(dtype).removeprefix("torch."), time=datetime.now(UTC).isoformat(timespec="milliseconds"),
    )  # fmt: skip


def code() -> dict[str, str]:
    """A checksum of each of this project's files that is in use, and torch's version."""
    files = {getattr(module, "__file__", None) or "" for module in list(sys.modules.values())}
    own = sorted(file for file in files if os.path.dirname(file) == os.path.dirname(__file__))
    checksums = {f"{Path(file).name} has checksum": f"{zlib.crc32(Path(file).read_bytes()):08x}" for file in own}
    return {"torch is": torch.__version__} | checksums


def git_commit() -> str | None:
    """The commit of this code, with + behind it if files differ; None outside of a git checkout."""
    here = ["git", "-C", os.path.dirname(os.path.abspath(__file__))]
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # GIT_DIR: another's
    try:
        commit = subprocess.run([*here, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, env=env)
        changed = subprocess.run([*here, "status", "--porcelain", "-uno"], capture_output=True, text=True, env=env)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+" if changed.stdout else "")
