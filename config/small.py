# A small model of your own text, for a laptop's CPU. On a GPU you can make it larger.
#     python fineweb.py --files='notes/**/*.txt' --out_dir=data/notes
#     python train_gpt2.py config/small.py
#     python train_gpt2.py config/small.py --data_dir=data/imdb --out_dir=out/imdb
# Measured: val loss 1.337 on 0.7 MB of novels by bytes, in 5 minutes
# (records/2026-11-21_first_hour).
# huggingface.py exports it with its own code; with --mlp=swiglu --qk_norm=False it is a Llama.
import torch

out_dir = "out/notes"
data_dir = "data/notes"

dtype = "bfloat16" if torch.cpu._is_avx512_bf16_supported() and not torch.cuda.is_available() else "auto"
compile = False

batch_size = 8
total_batch_size = 2048
max_steps = 1000
patience = 4  # a small text is soon known by heart

val_interval = 50
val_tokens = 32768
sample_interval = 250
checkpoint_interval = 50

optimizer = "muon"
learning_rate = 3e-3
min_lr = 1e-4
schedule = "linear"

block_size = 256
n_layer = 4
n_head = 4
n_embd = 128
bias = False
pos = "rope"
norm = "rmsnorm"
mlp = "relu2"
qk_norm = True
