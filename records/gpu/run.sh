#!/usr/bin/env bash
# Everything this repository claims about GPUs, on one card: see README.md beside this file.
#   bash records/gpu/run.sh OUT_DIR [--only=right|fast|ROW,ROW,...] [--device=cpu] [--text=FILE] [--data=DIR] [--nanogpt=DIR]
# PYTHON=python3 says which Python; it needs torch, numpy and tiktoken, and no network.
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/run.py" "$@"
