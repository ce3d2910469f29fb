"""The fine-tuning table: GPT-2s of all sizes, contexts and batches, on WikiText and IMDB, beside the reported losses.

    for data in wikitext2_detokenized wikitext103_detokenized imdb; do python fineweb.py config/data/$data.py; done
    python records/2026-11-20_finetune_table/table.py

Every cell is a run of train_gpt2.py with config/finetune_<data>.py, in a folder of its own. The same command goes on
where it was stopped, and runs no cell again that is done. A cell that fails is a line of the table, and is tried again.
The table is printed line by line and is in out_dir/table.md. The train loss is the mean of all steps, with dropout; val
and word loss are those of the last step, on all of val.
"""

import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from configurator import UserError, cli, configure  # noqa: E402
from files import whole_file  # noqa: E402
from huggingface import save_folder  # noqa: E402
from metrics import read_metrics  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402

BATCH = {"wikitext2": 8, "wikitext103": 8, "imdb": 64}  # sequences in a step
REPORTED = {  # data, model: {context: (val loss, word loss)} at that batch
    ("wikitext2", "gpt2"): {256: (3.03, 3.40), 512: (2.94, 3.31), 1024: (2.87, 3.22)},
    ("wikitext2", "gpt2-medium"): {256: (2.81, 3.16), 512: (2.70, 3.04), 1024: (2.63, 2.95)},
    ("wikitext2", "gpt2-large"): {256: (2.74, 3.08), 512: (2.59, 2.91), 1024: (2.51, 2.82)},
    ("wikitext2", "gpt2-xl"): {256: (2.71, 3.04), 512: (2.52, 2.87)},
    ("imdb", "gpt2"): {256: (3.58, 4.61), 512: (3.55, 4.57), 1024: (3.52, 4.54)},
    ("imdb", "gpt2-medium"): {256: (3.35, 4.31), 512: (3.30, 4.25), 1024: (3.30, 4.26)},
}
HEAD = """\
| data | model | batch | context | steps | train loss | val loss | word loss | reported val loss | reported word loss |
|---|---|---|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class TableConfig:
    models: str = "gpt2,gpt2-medium,gpt2-large,gpt2-xl"  # or folders; what train_gpt2.py's init_from takes
    contexts: str = "256,512,1024"  # tokens
    batches: str | None = "8,16"  # sequences in a step at a context of 256, beside the usual 8 or, of imdb, 64
    data: str = "wikitext2,wikitext103,imdb"  # one or some
    wikitext2_dir: str = "data/wikitext2_detokenized"  # token shards
    wikitext103_dir: str = "data/wikitext103_detokenized"
    imdb_dir: str = "data/imdb"
    out_dir: str = "out/finetune_table"  # where the runs and table.md go
    micro_batch: int | None = None  # sequences at a time, where memory is short; None: all of a step
    flags: str = ""  # more for train_gpt2.py: --flags="--compile=False --max_steps=20"
    standins: bool = False  # two-layer models with random weights in place of the models, to try the table itself


def main() -> int:
    config, _ = configure(TableConfig)
    contexts = [int(context) for context in config.contexts.split(",")]
    others = [int(batch) for batch in (config.batches or "").split(",") if batch]
    if unknown := set(config.data.split(",")) - BATCH.keys():
        raise UserError(f"--data={config.data}: there is no {min(unknown)}; choose from {', '.join(BATCH)}")
    Path(config.out_dir).mkdir(parents=True, exist_ok=True)
    print(HEAD, end="", flush=True)
    lines = []
    for data in config.data.split(","):
        for number, model in enumerate(config.models.split(",")):
            source = standin(config.out_dir, model, number) if config.standins else model
            sizes = [(batch, context) for context in contexts for batch in batches(data, context, others)]
            for batch, context in sizes:
                result = cell(config, data, model, source, batch, context)
                known = REPORTED.get((data, model), {}) if batch == BATCH[data] else {}
                reported = [f"{loss:.2f}" for loss in known.get(context, ())] or ["-", "-"]
                name = f"{Path(model).name}{' (stand-in)' if config.standins else ''}"
                lines.append(f"| {' | '.join([data, name, str(batch), str(context), *result, *reported])} |\n")
                print(lines[-1], end="", flush=True)
                with whole_file(Path(config.out_dir, "table.md"), "w") as file:
                    file.write(HEAD + "".join(lines))
    return 0


def batches(data: str, context: int, others: list[int]) -> list[int]:
    """The batches, in sequences, that are run on this data at this context."""
    return sorted({BATCH[data], *(others if context == 256 else [])})


def cell(config: TableConfig, data: str, model: str, source: str, batch: int, context: int) -> list[str]:
    """Steps, train, val and word loss of a finished run, which is made where there is none; or what went wrong."""
    run = Path(config.out_dir, f"{data}_{Path(model).name}_{batch}x{context}")
    said = ""
    if not (losses := finished(run)):
        micro = config.micro_batch or batch
        command = [
            sys.executable, ROOT / "train_gpt2.py", ROOT / f"config/finetune_{data}.py", f"--init_from={source}",
            f"--block_size={context}", f"--batch_size={micro}", f"--total_batch_size={batch * context}",
            f"--data_dir={getattr(config, f'{data}_dir')}", f"--out_dir={run}", "--keep_checkpoints=1",
            *shlex.split(config.flags), "--resume=True",
        ]  # fmt: skip
        with open(f"{run}.log", "a", encoding="utf-8") as log:
            process = subprocess.run(command, stdout=log, stderr=subprocess.PIPE, text=True)
            log.write(process.stderr)
        said = (
            "out of memory" if "error: out of memory" in process.stderr else "".join(process.stderr.splitlines()[-1:])
        )
        losses = finished(run)
    return losses or [f"failed: {said or 'stopped'}".replace("|", "/"), "-", "-", "-"]


def finished(run: Path) -> list[str] | None:
    """Steps, the mean train loss of all of them, val and word loss of a run that is done; None of any other."""
    path = run / "metrics.jsonl"
    records = read_metrics(path) if path.exists() else []
    if not any(record.get("event") == "done" for record in records):
        return None
    last = [record for record in records if record["kind"] == "val"][-1]
    train = [record for record in records if record["kind"] == "train"]
    before = [0, *(record["step"] for record in train[:-1])]  # a record's mean_loss is of the steps since the last
    means = [(record["mean_loss"], record["step"] - step) for record, step in zip(train, before, strict=True)]
    known = [(loss, steps) for loss, steps in means if loss is not None]
    train_loss = sum(loss * steps for loss, steps in known) / sum(steps for _, steps in known) if known else None
    losses = (train_loss, last["val_loss"], last["word_loss"])
    return [str(last["step"]), *("-" if loss is None else f"{loss:.4f}" for loss in losses)]


def standin(out_dir: str, model: str, seed: int) -> str:
    """The folder of a two-layer model with random weights and GPT-2's vocabulary, made where there is none."""
    folder = Path(out_dir, "standins", model)
    if not folder.exists():
        torch.manual_seed(seed)
        save_folder(GPT(GPTConfig(n_layer=2, n_head=2, n_embd=64)), "gpt2", folder, "random weights")
    return str(folder)


if __name__ == "__main__":
    cli(main)
