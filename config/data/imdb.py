# IMDB: 50,000 film reviews, 66 MB, about 15M tokens; 10% of them,
# drawn by val_seed, are the validation set. (Rows are sorted by label: the last are all positive.)
#     python fineweb.py config/data/imdb.py
dataset = "stanfordnlp/imdb"
split = "train+test"
val_fraction = 0.1
val_seed = 1
out_dir = "data/imdb"
