# Tiny Shakespeare by characters (bytes: all is ASCII): 1.1M tokens, the last
# 10% are the validation set.
#     python fineweb.py config/data/shakespeare_char.py
url = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
tokenizer = "bytes"
val_fraction = 0.1
out_dir = "data/shakespeare_char"
