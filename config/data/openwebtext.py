# OpenWebText, the open remake of GPT-2's own training data: 8M pages, 9B tokens; nanoGPT's default.
# A stream of about 24 GB; 18 GB of shards; a random 0.05% of the pages is validation. nanoGPT's is a random 0.05% too,
# but of other pages: a permutation of all of them draws those. So val losses differ a little.
#     python fineweb.py config/data/openwebtext.py
dataset = "Skylion007/openwebtext"
val_fraction = 0.0005
val_seed = 2357
out_dir = "data/openwebtext"
