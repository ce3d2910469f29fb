"""hellaswag.py's losses next to lm-evaluation-harness's, of the same strings by the same model.

    python records/2026-11-20_lm_eval/compare.py --model=out/mine [--data=FILE.jsonl] [--examples=400]

The model goes through huggingface.py to a folder, from which lm-evaluation-harness loads it into transformers and runs
its own hellaswag task, with its own rendering of the texts, on examples drawn evenly from the file. The very contexts
and continuations it logs are then tokenised with our tokenizer and scored by hellaswag.ending_losses. Exit status 1
where a token differs, a loglikelihood differs by 1e-3 nats or more, or acc or acc_norm is not the same.
Needs `lm-eval[hf]` beside requirements.txt; nothing is downloaded.
"""

import contextlib
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

# First in the path: Hugging Face too has a package called evaluate.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
import lm_eval
from lm_eval.models.huggingface import HFLM

from configurator import UserError, cli, configure
from distributed import World
from hellaswag import VAL_FILE, Example, ending_losses
from huggingface import load_model, save_folder
from tokenizer import get_tokenizer

TOLERANCE = 1e-3  # nats, in a sum of float32 losses of up to some hundred tokens


@dataclass(frozen=True)
class CompareConfig:
    model: str | None = None  # a checkpoint, a run or Hugging Face folder, or gpt2..gpt2-xl; None: the newest run
    data: str = VAL_FILE  # HellaSwag's own .jsonl
    examples: int = 400  # drawn evenly from the file


def split(enc, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokens of both by lm-evaluation-harness's rule: spaces at the end of the context belong to the continuation, and
    its tokens are those of the whole text without the first so many, which the context alone has."""
    stripped = context.rstrip()
    start = enc.encode_ordinary(stripped)
    return start, enc.encode_ordinary(context + continuation)[len(start) :]


def main() -> int:
    config, _ = configure(CompareConfig)
    data = os.path.abspath(config.data)
    if not os.path.isfile(data):
        raise UserError(f"data {config.data}: no such file")
    world = World("cpu")
    model, tokenizer, path = load_model(config.model, world.device)
    if tokenizer is None:
        raise UserError(f"{path}: its tokenizer is not known, so it cannot read the examples")
    count = sum(1 for _ in open(data, "rb"))  # noqa: SIM115
    numbers = np.linspace(0, count, min(config.examples, count), endpoint=False).astype(int).tolist()

    with tempfile.TemporaryDirectory() as folder:
        save_folder(model, tokenizer, Path(folder, "hf"), str(path))
        lm = HFLM(pretrained=f"{folder}/hf", device="cpu", dtype="float32", batch_size=16)
        task = {  # its own, reading a file in place of the hub
            "include": str(Path(lm_eval.__file__).parent / "tasks/hellaswag/hellaswag.yaml"), "training_split": None,
            "dataset_path": "json", "dataset_kwargs": {"data_files": {"validation": data}, "cache_dir": folder},
        }  # fmt: skip
        Path(folder, "hellaswag.yaml").write_text(json.dumps(task))
        results = lm_eval.simple_evaluate(
            lm, tasks=[f"{folder}/hellaswag.yaml"], samples={"hellaswag": numbers}, num_fewshot=0, bootstrap_iters=0
        )
    samples = results["samples"]["hellaswag"]
    assert sorted(sample["doc_id"] for sample in samples) == numbers

    enc = get_tokenizer(tokenizer)
    examples, theirs = [], []
    for sample in samples:
        pairs = sample["arguments"]  # four of (context, continuation)
        tokens = [split(enc, *pair) for pair in pairs]
        if tokens != [lm._encode_pair(*pair) for pair in pairs]:
            print(f"example {sample['doc_id']}: other tokens")
            return 1
        examples.append(Example(tokens[0][0], [ending for _, ending in tokens], int(sample["target"])))
        theirs.append([loglikelihood for loglikelihood, _ in sample["filtered_resps"]])
    longest = max(len(context) + max(map(len, endings)) for context, endings, _ in examples)
    if longest > model.config.block_size + 1:
        raise UserError(f"{path}: block_size = {model.config.block_size}, but a text has {longest} tokens")

    theirs = np.array(theirs)
    ours = -ending_losses(model, examples, 4 * model.config.block_size, world, contextlib.nullcontext())
    characters = np.array([[len(ending) for ending in sample["doc"]["choices"]] for sample in samples])
    labels = np.array([example.label for example in examples])
    rows = [("mean loglikelihood, nats", theirs.mean(), ours.mean())]
    for name, values in (("acc", ours), ("acc_norm", ours / characters)):
        rows.append((name, results["results"]["hellaswag"][f"{name},none"], (values.argmax(1) == labels).mean()))
    difference = abs(theirs - ours).max()

    packages = ", ".join(f"{name} {version(name)}" for name in ("lm_eval", "transformers", "torch"))
    print(f"{path}, {len(examples)} of {count:,} examples; {packages}\n")
    print("| | lm-evaluation-harness | ours |\n|---|---|---|")
    for name, a, b in rows:
        print(f"| {name} | {a:.6f} | {b:.6f} |")
    print(f"\nlargest difference of a loglikelihood: {difference:.1e}; all {ours.size:,} token splits are the same")
    return 0 if difference < TOLERANCE and all(abs(a - b) < 1e-9 for _, a, b in rows[1:]) else 1


if __name__ == "__main__":
    cli(main)
