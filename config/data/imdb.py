# IMDB: 50,000 film reviews, 66 MB, about 15M tokens; the last 5,000 in file order are validation.
#     python fineweb.py config/data/imdb.py
dataset = "stanfordnlp/imdb"
split = "train+test"
val_fraction = 0.1
out_dir = "data/imdb"
