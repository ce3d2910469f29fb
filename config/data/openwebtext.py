# OpenWebText, the open remake of GPT-2's own training data: 8M pages, 9B tokens; nanoGPT's default.
# A stream of about 24 GB; 18 GB of shards; a random 0.05% of the pages are the validation set.
# nanoGPT's are others, drawn by a permutation of all, so val losses differ a little.
#     python fineweb.py config/data/openwebtext.py
dataset = "Skylion007/openwebtext"
val_fraction = 0.0005
val_seed = 2357
out_dir = "data/openwebtext"
