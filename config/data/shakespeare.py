# Tiny Shakespeare in GPT-2's tokens: 1.1 MB, 338,025 tokens; the last 10% of
# its characters are the validation set.
#     python fineweb.py config/data/shakespeare.py
url = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
val_fraction = 0.1
out_dir = "data/shakespeare"
