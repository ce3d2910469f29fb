# The speed run's recipe at the size of a laptop, and what gained on top of it: a bench for changes of your own.
#     python fineweb.py config/data/stdlib.py
#     python train_gpt2.py config/speedrun_cpu.py
import torch

out_dir = "out/speedrun_cpu"
data_dir = "data/stdlib"

device = "cpu"
compile = False  # True is faster where there is a compiler
dtype = "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"

block_size = 128
n_layer = 4
n_head = 2
n_embd = 128
pos = "rope"
rope_fraction = 0.5
rope_base = 1024
qk_norm = True
attn_scale = 0.12
mlp = "relu2"
norm = "rmsnorm"
norm_eps = 1.19e-7
embed_norm = True
tie_weights = False
head_bias = True
logit_softcap = 15
init = "zero"
value_embeds = 2  # on top of the recipe

batch_size = 16
total_batch_size = 2048
max_steps = 400

optimizer = "muon"
learning_rate = 0.025
embed_lr = 0.7
head_lr = 0.012  # 0.004 at 124M
vector_lr = 0.015
min_lr = 0.0
warmup_steps = 0
schedule = "wsd"
decay_fraction = 0.7
weight_decay = 0.05
outer_decay = 0.001
beta1 = 0.8
beta2 = 0.95
adam_eps = 1e-10
muon_update = "spectral"
even_units = True  # on top too
grad_clip = 0.0

val_interval = 50
val_tokens = 131072
sample_interval = 400
sample_start = "def "
checkpoint_interval = 200
