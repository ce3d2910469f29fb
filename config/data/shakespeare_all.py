# Tiny Shakespeare in GPT-2's tokens, all 338,025 of them for training: there is no validation set,
# so training needs --val_interval=0.
#     python fineweb.py config/data/shakespeare_all.py
url = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
val_fraction = 0
out_dir = "data/shakespeare_all"
