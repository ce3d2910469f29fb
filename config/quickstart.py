# Three minutes on two CPU cores that compute in bfloat16: a 1.8M-parameter model that writes Python, byte by byte.
#     python fineweb.py config/data/stdlib.py
#     python train_gpt2.py config/quickstart.py
import torch

out_dir = "out/quickstart"
data_dir = "data/stdlib"

# the machine: any CPU, no compiler
device = "cpu"
compile = False
dtype = "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"  # where the CPU has it, 4 x faster products

# the model: small, with everything that makes small models learn fast
block_size = 256
n_layer = 4
n_head = 3
n_embd = 192
bias = False
pos = "rope"
norm = "rmsnorm"
mlp = "relu2"
qk_norm = True

# 700 steps of 4,096 bytes: a quarter of the standard library
batch_size = 16
total_batch_size = 4096
max_steps = 700
optimizer = "muon"
learning_rate = 6e-3
min_lr = 1e-4
warmup_steps = 20
schedule = "linear"

val_interval = 100
val_tokens = 131072
sample_interval = 350
sample_start = "class "
checkpoint_interval = 100
