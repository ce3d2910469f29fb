# The recipe of speedrun_124m.py with two additions, at the size of a laptop: to try ideas with.
#     python fineweb.py config/data/stdlib.py
#     python train_gpt2.py config/speedrun_cpu.py
# Measured: val loss 1.400 (2.02 bits per byte) after 52 s on two CPU cores
# (records/2026-11-21_speedrun).
import torch

out_dir = "out/speedrun_cpu"
data_dir = "data/stdlib"

device = "cpu"
dtype = "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"
compile = False  # True is faster where there is a C++ compiler

total_batch_size = 2048
max_steps = 400

val_interval = 50
val_tokens = 131072
sample_interval = 400
sample_start = "def "
checkpoint_interval = 200

optimizer = "muon"
learning_rate = 0.025  # of the blocks' matrices
min_lr = 0.0
warmup_steps = 0
schedule = "wsd"
decay_fraction = 0.7
embed_lr = 0.7
head_lr = 0.012  # 0.004 at 124M
vector_lr = 0.015
weight_decay = 0.05
outer_decay = 0.001
grad_clip = 0.0
beta1 = 0.8
adam_eps = 1e-10
muon_update = "spectral"
even_units = True  # on top of the recipe

block_size = 128
n_layer = 4
n_head = 2
n_embd = 128
pos = "rope"
norm = "rmsnorm"
mlp = "relu2"
norm_eps = 1.19e-7
rope_base = 1024
rope_fraction = 0.5
tie_weights = False
qk_norm = True
attn_scale = 0.12
embed_norm = True
value_embeds = 2  # on top of the recipe
head_bias = True
logit_softcap = 15
init = "zero"
