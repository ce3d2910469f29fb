# FineWeb-Edu, 10B tokens: educational web pages, what build-nanogpt and most GPT-2 reproductions
# train on. A stream of about 28 GB; 20 GB of shards; the first shard is the validation set.
#     python fineweb.py config/data/fineweb_edu.py
dataset = "HuggingFaceFW/fineweb-edu"
subset = "sample-10BT"
out_dir = "data/fineweb_edu10B"
