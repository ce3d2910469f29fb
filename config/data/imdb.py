# IMDB: 50,000 film reviews, 66 MB, about 15M tokens; a tenth of them, drawn by val_seed, is
# validation. (Rows are sorted by label: the last tenth in file order would be positive reviews.)
#     python fineweb.py config/data/imdb.py
dataset = "stanfordnlp/imdb"
split = "train+test"
val_fraction = 0.1
val_seed = 1
out_dir = "data/imdb"
