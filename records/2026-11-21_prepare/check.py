"""What fineweb.py promises, measured: its speed next to another checkout's, its ids next to tiktoken's, kills, memory.

python records/2026-11-21_prepare/check.py speed OTHER_CHECKOUT 'books/train*.parquet'
python records/2026-11-21_prepare/check.py ids 'books/*.parquet' 'imdb/**/*.parquet' '/usr/lib/python3/**/*.py' random
python records/2026-11-21_prepare/check.py kills 200 '[bd]*/validation*.parquet'
python records/2026-11-21_prepare/check.py memory 'books/train*.parquet'
"""

import glob
import hashlib
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from sources import open_file  # noqa: E402

from tokenizer import BatchEncoder, get_tokenizer, has_new_characters  # noqa: E402


def command(root: str | Path, files: str, out_dir: str | Path, *more: str) -> list[str]:
    return [sys.executable, f"{root}/fineweb.py", f"--files={files}", f"--out_dir={out_dir}", *more]


def tokens(folder: Path) -> np.ndarray:
    paths = [path for split in ("val", "train") for path in sorted(folder.glob(f"*_{split}_*.bin"))]
    return np.concatenate([np.fromfile(path, dtype="<u2", offset=1024) for path in paths])


def speed(other: str, files: str, rounds: int = 5) -> None:
    """MB/s of both checkouts in turn, and the ratio of each round."""
    with tempfile.TemporaryDirectory() as name:
        for _ in range(rounds):
            rates, walls, made = [], [], []
            for root in (other, ROOT):
                out_dir, start = Path(name, "out"), time.perf_counter()
                done = subprocess.run(
                    command(root, files, out_dir, "--shard_tokens=10000000"), cwd=root, check=True, capture_output=True,
                    text=True,
                )  # fmt: skip
                walls.append(time.perf_counter() - start)
                rates.append(float(re.search(r"([\d.]+) MB/s", done.stdout).group(1)))
                made.append(tokens(out_dir))
                shutil.rmtree(out_dir)
            assert np.array_equal(*made)
            print(f"{rates[0]:6.1f} and {rates[1]:6.1f} MB/s: {rates[1] / rates[0]:.2f} x; ", end="")
            print(f"{walls[0]:5.1f} and {walls[1]:5.1f} s with all imports: {walls[0] / walls[1]:.2f} x", flush=True)


def random_strings(count: int) -> list[str]:
    """Half of any code points, half of a few kinds that the pattern tells apart."""
    rng = random.Random(0)
    few = [*"ab'sSdtlvem1२½ \n\t\r\0\u00a0\u2003\x85é中🙂_-!\u0301\u200d", "  ", "'ll", "<|endoftext|>"]

    def any_string() -> str:
        codes = rng.choices(range(0x110000 - 0x800), k=rng.randrange(1, 30))
        return "".join(chr(code + 0x800 if code >= 0xD800 else code) for code in codes)

    return [any_string() if i % 2 else "".join(rng.choices(few, k=rng.randrange(1, 40))) for i in range(count)]


def ids(*patterns: str) -> None:
    """Compare the ids of every document with tiktoken's."""
    enc = get_tokenizer("gpt2")
    encoder = BatchEncoder(enc, 2)
    for pattern in patterns:
        if pattern == "random":
            texts = random_strings(1_000_000)
        else:
            paths = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
            texts = [text for path in paths for text in documents(path)]
        routed = [text for text in texts if has_new_characters([text.encode()])]
        others = [text for text in texts if not has_new_characters([text.encode()])]
        differ = sum(compare(encoder, enc, some) for some in (routed, others))
        size = sum(len(text.encode()) for text in texts)
        print(f"{pattern}: {len(texts):,} documents, {size / 1e6:,.1f} MB, ", end="")
        print(f"{len(routed):,} with characters of tiktoken's alone: {differ} differ", flush=True)


def documents(path: str) -> list[str]:
    if path.endswith(".parquet"):
        return [text for text, _ in open_file(path, "text")[0]()]
    return [Path(path).read_text(encoding="utf-8", errors="replace")]


def compare(encoder: BatchEncoder, enc, texts: list[str]) -> int:
    """How many of the texts get other ids than tiktoken's."""
    differ = 0
    for start in range(0, len(texts), 5_000):
        batch = texts[start : start + 5_000]
        all_ids, counts = encoder([text.encode() for text in batch])
        for text, found in zip(batch, np.split(all_ids, np.cumsum(counts)[:-1]), strict=True):
            differ += not np.array_equal(found, enc.encode_to_numpy(text, disallowed_special=()))
    return differ


def kills(count: str, files: str) -> None:
    """Kill preparations at random moments until they are complete; every shard always has the same bytes."""
    rng, killed, completed, at_shards = random.Random(0), 0, 0, []
    options = ["--shard_tokens=50000", "--val_shards=2"]
    with tempfile.TemporaryDirectory() as name:
        folder, out_dir = Path(name), Path(name, "killed", "out")
        start = time.perf_counter()
        subprocess.run(command(ROOT, files, folder / "straight" / "out", *options), check=True, capture_output=True)
        seconds = time.perf_counter() - start
        straight = contents(folder / "straight" / "out")
        while killed < int(count):
            process = subprocess.Popen(command(ROOT, files, out_dir, *options), stdout=-3, stderr=-3)
            try:
                process.wait(rng.uniform(0.3, 1) * seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                killed += 1
            made = contents(out_dir) if out_dir.exists() else {}
            assert all(straight[file] == digest for file, digest in made.items() if file.endswith(".bin"))
            at_shards.append(sum(file.endswith(".bin") for file in made))
            if (out_dir / "meta.json").exists():
                assert made == straight
                completed += 1
                shutil.rmtree(out_dir)
    print(f"{killed} kills, {completed} preparations completed, each with the same bytes as one that was not killed; ")
    of_killed = [sum(low <= n < low + 10 for n in at_shards) for low in range(0, 40, 10)]
    print(f"processes that left 0-9, 10-19, ... shards of {len(straight) - 1}: {of_killed}")


def contents(folder: Path) -> dict[str, str]:
    """{name: sha256} of the files that have their names."""
    files = [path for path in folder.iterdir() if not path.name.startswith(".")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def memory(files: str) -> None:
    """Peak memory of ordinary rows, and of a single document of 1 GB: prose, words that never come again, spaces."""
    with tempfile.TemporaryDirectory() as name:
        out_dir = Path(name, "out")
        measure("rows", command(ROOT, files, out_dir, "--val_fraction=0.1"))
        prose = "\n".join(text for path in sorted(glob.glob(files))[:1] for text, _ in open_file(path, "text")[0]())
        rng = np.random.default_rng(0)
        words = rng.integers(97, 123, size=(1_000_000, 9), dtype=np.uint8)
        for what in ("prose", "new words", "spaces"):
            path = Path(name, "one.txt")
            with open(path, "wb") as file:
                while file.tell() < 1e9:
                    if what == "new words":
                        words = rng.integers(97, 123, size=(1_000_000, 9), dtype=np.uint8)
                        words[:, 8] = 32
                    file.write({"prose": prose.encode(), "new words": words.tobytes(), "spaces": b" " * 10**7}[what])
            measure(f"one document of 1 GB, {what}", command(ROOT, path, out_dir, "--val_fraction=0.1"))


def measure(what: str, options: list[str]) -> None:
    start = time.perf_counter()
    process = subprocess.Popen(options, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    print(f"{what}: {usage.ru_maxrss / 1024:,.0f} MB at most, {time.perf_counter() - start:,.1f} s", flush=True)
    shutil.rmtree(options[3].removeprefix("--out_dir="))


if __name__ == "__main__":
    {"speed": speed, "ids": ids, "kills": kills, "memory": memory}[sys.argv[1]](*sys.argv[2:])
