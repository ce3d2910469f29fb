# A first run: 2M parameters learn to write Python by bytes, in 3 to 6 minutes of two CPU cores.
#     python fineweb.py config/data/stdlib.py
#     python train_gpt2.py config/quickstart.py
# Measured: val loss 1.156, 1.668 bits per byte (records/2026-11-21_quickstart).
import torch

out_dir = "out/quickstart"
data_dir = "data/stdlib"

device = "cpu"
dtype = "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"  # the faster one
compile = False  # needs no C++ compiler

total_batch_size = 4096
max_steps = 500  # a sixth of the standard library

val_interval = 100
val_tokens = 131072
sample_interval = 250
sample_start = "class "
checkpoint_interval = 100

optimizer = "muon"
learning_rate = 6e-3  # of the blocks' matrices
min_lr = 0.0
warmup_steps = 0
schedule = "linear"
embed_lr = 0.3
head_lr = 0.01
vector_lr = 0.02
outer_decay = 0.0
grad_clip = 0.0
beta1 = 0.8
adam_eps = 1e-10
average = 0.1

# small, with all that lets a small model learn fast
block_size = 256
n_layer = 4
n_head = 3
n_embd = 192
bias = False
pos = "rope"
norm = "rmsnorm"
mlp = "relu2"
tie_weights = False
qk_norm = True
embed_norm = True
value_embeds = 2
head_bias = True
logit_softcap = 15
init = "zero"
