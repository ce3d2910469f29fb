# FineWeb-Edu, 100B tokens: ten times as much, for longer or larger runs.
# A stream of about 280 GB; 200 GB of shards; the first shard is the validation set.
#     python fineweb.py config/data/fineweb_edu100B.py
dataset = "HuggingFaceFW/fineweb-edu"
subset = "sample-100BT"
out_dir = "data/fineweb_edu100B"
