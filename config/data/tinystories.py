# TinyStories: 2.1M stories in a small child's words, 1.9 GB, half a billion tokens of its own.
#     python tokenizer.py --dataset=roneneldan/TinyStories --vocab_size=8192 --out=tinystories.json
#     python fineweb.py config/data/tinystories.py
dataset = "roneneldan/TinyStories"
val_split = "validation"
tokenizer = "tinystories.json"
out_dir = "data/tinystories"
