# A small model of any text, for a laptop's CPU. With a GPU make it larger, as the README does.
#     python fineweb.py --files='notes/**/*.txt' --out_dir=data/notes
#     python train_gpt2.py config/small.py
#     python train_gpt2.py config/small.py --data_dir=data/imdb --out_dir=out/imdb
# huggingface.py exports it with its own code. With --mlp=swiglu --qk_norm=False it is a LlamaForCausalLM instead.
import torch

out_dir = "out/notes"
data_dir = "data/notes"

compile = False
dtype = "bfloat16" if torch.cpu._is_avx512_bf16_supported() and not torch.cuda.is_available() else "auto"

block_size = 256
n_layer = 4
n_head = 4
n_embd = 128
bias = False
pos = "rope"
norm = "rmsnorm"
mlp = "relu2"
qk_norm = True

batch_size = 8
total_batch_size = 2048
max_steps = 1000
optimizer = "muon"
learning_rate = 3e-3
min_lr = 1e-4
schedule = "linear"

val_interval = 50
val_tokens = 32768
sample_interval = 250
checkpoint_interval = 50
patience = 4  # a small text is soon known by heart
