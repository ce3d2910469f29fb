# Tiny Shakespeare by characters on a laptop CPU, in under a minute; nanoGPT's small CPU run is the yardstick.
#     python fineweb.py config/data/shakespeare_char.py
#     python train_gpt2.py config/shakespeare_cpu.py
import torch

out_dir = "out/shakespeare_cpu"
data_dir = "data/shakespeare_char"

device = "cpu"
compile = False
dtype = "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"

block_size = 64
n_layer = 4
n_head = 2
n_embd = 128
bias = False
pos = "rope"
norm = "rmsnorm"
mlp = "relu2"
qk_norm = True

batch_size = 32
total_batch_size = 2048
max_steps = 600
optimizer = "muon"
learning_rate = 1e-2
min_lr = 1e-4
warmup_steps = 10
schedule = "linear"

val_interval = 50
sample_interval = 300
sample_start = "ROMEO:"
checkpoint_interval = 200
