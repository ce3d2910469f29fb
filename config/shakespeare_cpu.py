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
value_embeds = 2
embed_norm = True
tie_weights = False
head_bias = True
logit_softcap = 15
init = "zero"

batch_size = 32
total_batch_size = 2048
max_steps = 600
optimizer = "muon"
learning_rate = 1e-2  # of the blocks' matrices
embed_lr = 0.3
head_lr = 0.01
vector_lr = 0.02
min_lr = 0.0
warmup_steps = 0
schedule = "linear"
outer_decay = 0.0
beta1 = 0.8
adam_eps = 1e-10
grad_clip = 0.0
average = 0.1

val_interval = 25
sample_interval = 300
sample_start = "ROMEO:"
checkpoint_interval = 200
