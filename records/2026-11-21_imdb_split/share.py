"""The share of positive reviews in each split of prepared IMDB.

python records/2026-11-21_imdb_split/share.py --imdb=FOLDER --data_dir=data/imdb

FOLDER has the Parquet files, with columns text and label. Reviews are read back from the shards and looked up by their
text; those that stand there twice with both labels count as half.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import cli, configure
from files import HEADER_BYTES, find_shards
from tokenizer import get_tokenizer


@dataclass(frozen=True)
class ShareConfig:
    imdb: str  # folder of Parquet files
    data_dir: str = "data/imdb"  # token shards


def main() -> int:
    config, _ = configure(ShareConfig)
    labels: dict[str, list[int]] = {}
    for path in sorted(Path(config.imdb).glob("*.parquet")):
        for row in pyarrow.parquet.read_table(path, columns=["text", "label"]).to_pylist():
            labels.setdefault(row["text"], []).append(row["label"])
    enc = get_tokenizer("gpt2")
    for split in ("train", "val"):
        ids = np.concatenate([np.fromfile(p, "<u2", offset=HEADER_BYTES) for p in find_shards(config.data_dir, split)])
        reviews = np.split(ids, np.flatnonzero(ids == enc.eot_token))[1:]
        positive = [np.mean(labels[enc.decode(review[1:].tolist())]) for review in reviews]
        print(f"{split}: {len(reviews):,} reviews, {np.mean(positive):.4f} positive")
    return 0


if __name__ == "__main__":
    cli(main)
