# Tiny Shakespeare by characters on a laptop CPU in a minute, to compare with nanoGPT's CPU run.
#     python fineweb.py config/data/shakespeare_char.py
#     python train_gpt2.py config/shakespeare_cpu.py
# Measured: val loss 1.604; nanoGPT's final 1.898 in 0.11 of its time
# (records/2026-11-21_shakespeare_cpu).
import torch

out_dir = "out/shakespeare_cpu"
data_dir = "data/shakespeare_char"

device = "cpu"
dtype = "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"
compile = False

batch_size = 32
total_batch_size = 2048
max_steps = 600

val_interval = 25
sample_interval = 300
sample_start = "ROMEO:"
checkpoint_interval = 200

optimizer = "muon"
learning_rate = 1e-2  # of the blocks' matrices
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

block_size = 64
n_layer = 4
n_head = 2
n_embd = 128
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
