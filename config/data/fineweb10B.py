# FineWeb (not Edu), 10B tokens: what llm.c and the speed runs measure on.
# A stream of about 28 GB; 20 GB of shards; the first shard is the validation set.
#     python fineweb.py config/data/fineweb10B.py
dataset = "HuggingFaceFW/fineweb"
subset = "sample-10BT"
out_dir = "data/fineweb10B"
