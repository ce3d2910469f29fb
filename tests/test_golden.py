"""What the program computes stays what it was, to the bit: golden.json holds it.

    PYTHONPATH=. python tests/test_golden.py     # writes golden.json anew; say in the commit why the numbers changed

Bits of floating point belong to a machine and a torch version: on another one the numbers need only be near.
"""

import contextlib
import gzip
import hashlib
import json
import random
import tempfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import safetensors.torch
import torch
from conftest import TRAIN, call, metrics, write_shard

import checkpoint
import hellaswag
from distributed import World
from model import GPT, GPTConfig
from tokenizer import get_tokenizer

GOLDEN = Path(__file__).parent / "golden.json"
MODELS = {
    "gpt2": [],
    "modern": ["--pos=rope", "--norm=rmsnorm", "--mlp=swiglu", "--bias=False", "--tie_weights=False"],
    "speedrun": ["--pos=rope", "--norm=rmsnorm", "--mlp=relu2", "--bias=False", "--qk_norm=True"],
}
OPTIMIZERS = ["adamw", "adafactor", "muon"]
WORDS = "the quick brown fox jumps over a lazy dog while seven wizards brew tea".split()


def sha256(*arrays):
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def state_hash(state):
    return sha256(*(state[name].numpy() for name in sorted(state)))


def words(rng, count):
    return " ".join(rng.choice(WORDS) for _ in range(count))


def token_data(folder):
    rng = random.Random(0)
    for name, count in (("x_val_000000", 400), ("x_train_000001", 2000), ("x_train_000002", 1500)):
        write_shard(folder / f"{name}.bin", [256, *words(rng, count).encode()])
    meta = dict(tokenizer="bytes", vocab_size=257)
    meta |= {f"{split}_{what}": 0 for split in ("train", "val") for what in ("tokens", "words", "bytes")}
    for split in ("train", "val"):
        tokens = [(path.stat().st_size - 1024) // 2 for path in folder.glob(f"*_{split}_*.bin")]
        meta |= {f"{split}_tokens": sum(tokens), f"{split}_bytes": sum(tokens) - len(tokens)}
    (folder / "meta.json").write_text(json.dumps(meta))


def training(folder, *flags, processes=None, stop=None):
    """20 steps, with a break and a resume behind step `stop`."""
    data, out = folder / "data", folder / "run"
    if not data.exists():
        data.mkdir()
        token_data(data)
    args = [*TRAIN, f"--data_dir={data}", f"--out_dir={out}", "--sample_interval=20", "--sample_start=the ", *flags]
    for more in ([f"--max_steps={stop}"], ["--max_steps=20", "--resume=True"]) if stop else (["--max_steps=20"],):
        done = call("train_gpt2.py", *args, *more, processes=processes)
        assert done.returncode == 0, done.stderr
    return {
        "train": [record["loss"] for record in metrics(out, "train")],
        "val": [record["val_loss"] for record in metrics(out, "val")],
        "sample": [record["text"] for record in metrics(out, "sample")],
        "hash": state_hash(torch.load(out / "ckpt_000020.pt", weights_only=True)["model"]),
    }


def random_model(**flags):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=257, n_layer=2, n_head=2, n_embd=32, **flags))
    for p in model.parameters():
        p.data *= 5 if p.dim() == 2 else 1
    return model.eval()


FLAGS = {"gpt2": {}, "modern": dict(pos="rope", norm="rmsnorm", mlp="swiglu", bias=False, tie_weights=False)}


def saved(folder, name):
    model = random_model(**FLAGS[name])
    state = {"step": 1, "model": model.state_dict(), "gpt_config": vars(model.config), "tokenizer": "bytes"}
    return checkpoint.save(state, folder, keep=0, best_step=None)


def sampled(folder, name):
    path = saved(folder, name)
    options = ["--device=cpu", "--dtype=float32", "--start=the quick", "--num_samples=3", "--max_new_tokens=60"]
    done = call("sample.py", f"--model={path}", *options)
    assert done.returncode == 0, done.stderr
    return {"text": done.stdout}


def exported(folder, name):
    done = call("huggingface.py", f"--model={saved(folder, name)}", f"--out_dir={folder / 'hf'}")
    assert done.returncode == 0, done.stderr
    tensors = safetensors.torch.load_file(folder / "hf" / "model.safetensors")
    return {"names": sorted(tensors), "hash": state_hash(tensors)}


def ending_losses(folder, name):
    rng = random.Random(0)
    rows = [
        {"ctx": words(rng, n), "label": rng.randrange(4), "endings": [words(rng, rng.randint(1, 4)) for _ in range(4)]}
        for n in (1, 2, 5, 3, 7)
    ]
    (folder / "val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples = hellaswag.load(str(folder / "val.jsonl"), get_tokenizer("bytes"), 64)
    losses = hellaswag.ending_losses(random_model(**FLAGS[name]), examples, 300, World("cpu"), contextlib.nullcontext())
    return {"losses": losses.flatten().tolist()}


def write_texts(folder):
    """Documents of every kind of source; some are empty, long, or hold <|endoftext|> as text."""
    rng = random.Random(1)
    odd = ["", " ", "<|endoftext|>", "é中 \u00a0'll", "x" * 3000, "a\n\n\nb  c\t1234", " @-@ , 's\n = Title = \n"]
    texts = [rng.choice([words(rng, rng.randint(1, 60)), rng.choice(odd)]) for _ in range(200)]
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in texts[:60]]
    (folder / "a.jsonl").write_bytes(b"".join(lines[:40]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[40:])))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts[60:]}), folder / "c.parquet", row_group_size=9)
    (folder / "d.txt").write_text("\n".join(texts), encoding="utf-8")
    (folder / "rows").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / "rows" / "train.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": texts[:20]}), folder / "rows" / "test.parquet")


PREPARED = {
    "every kind of file": ["--files={}/*.*", "--val_fraction=0.1"],
    "by bytes": ["--files={}/*.*", "--val_fraction=0.25", "--tokenizer=bytes"],
    "one text": ["--files={}/d.txt", "--val_fraction=0.1"],
    "a data set": ["--dataset={}/rows", "--val_split=test"],
    "joined and detokenized": ["--dataset={}/rows", "--val_split=test", "--join=True", "--detokenize=wikitext"],
}


def prepared(folder, name):
    write_texts(folder)
    options = [option.replace("{}", str(folder)) for option in PREPARED[name]]
    done = call("fineweb.py", *options, f"--out_dir={folder / 'out'}", "--num_proc=1")
    assert done.returncode == 0, done.stderr
    meta = json.loads((folder / "out" / "meta.json").read_text())
    result = {key: meta[key] for key in sorted(meta) if key.endswith(("_tokens", "_words", "_bytes"))}
    for split in ("train", "val"):
        shards = sorted((folder / "out").glob(f"*_{split}_*.bin"))
        result[f"{split}_ids"] = sha256(*(np.fromfile(shard, dtype="<u2", offset=1024) for shard in shards))
    return result


CASES = {
    **{
        f"train {model} {optimizer}": lambda folder, model=model, optimizer=optimizer: training(
            folder, *MODELS[model], f"--optimizer={optimizer}", stop=10 if optimizer == "muon" else None
        )
        for model in MODELS
        for optimizer in OPTIMIZERS
    },
    "train float16": lambda folder: training(folder, "--dtype=float16"),
    "train bfloat16": lambda folder: training(folder, "--dtype=bfloat16", *MODELS["modern"]),
    "train with dropout on two processes": lambda folder: training(folder, "--dropout=0.1", processes=2),
    **{f"sample {name}": lambda folder, name=name: sampled(folder, name) for name in FLAGS},
    **{f"export {name}": lambda folder, name=name: exported(folder, name) for name in FLAGS},
    **{f"hellaswag {name}": lambda folder, name=name: ending_losses(folder, name) for name in FLAGS},
    **{f"prepare {name}": lambda folder, name=name: prepared(folder, name) for name in PREPARED},
}


def this_machine():
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = {line.partition(":")[2].strip() for line in cpuinfo.splitlines() if line.startswith("model name")}
    return f"torch {torch.__version__}, {' '.join(models)} {torch.backends.cpu.get_cpu_capability()}"


@pytest.mark.parametrize("name", CASES)
def test_as_it_was(name, tmp_path):
    golden = json.loads(GOLDEN.read_text())
    result, want = CASES[name](tmp_path), golden["cases"][name]
    if golden["machine"] == this_machine() or not name.startswith(("train", "sample", "hellaswag")):
        assert result == want
    else:
        for key, values in want.items():
            if isinstance(values, list) and isinstance(values[0], float):
                assert result[key] == pytest.approx(values, rel=1e-2)


if __name__ == "__main__":
    cases = {}
    for case, compute in CASES.items():
        with tempfile.TemporaryDirectory() as temporary:
            cases[case] = compute(Path(temporary))
    GOLDEN.write_text(json.dumps({"machine": this_machine(), "cases": cases}, indent=1) + "\n")
