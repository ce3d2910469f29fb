# An evening of one GPU: the recipe of speedrun_124m.py with smaller steps and two additions.
#     python fineweb.py config/data/fineweb10B.py
#     python train_gpt2.py config/one_gpu_124m.py
# Estimated: no card has run it. 1.7B tokens are 1 hour of an H200 or 3.5 of an RTX 4090. On top are
# two tables of value embeddings and even updates (-0.042 and -0.013 nats at the size of a CPU,
# records/2026-11-21_speedrun). Steps are a quarter of the recipe's. Smaller steps gained in three
# public searches on one GPU, and in our own at the size of a CPU. There the best learning rates
# went with the square root of the batch ratio, here 0.5 (records/2026-12-01_small_steps).

out_dir = "out/one_gpu_124m"
data_dir = "data/fineweb10B"

batch_size = 32  # 17 GB, by arithmetic
total_batch_size = 131072
max_steps = 13000  # 1.7B tokens, as speedrun_124m.py

val_interval = 500
sample_interval = 2000

optimizer = "muon"
learning_rate = 0.0125  # of the blocks' matrices
min_lr = 0.0
warmup_steps = 0
schedule = "wsd"
decay_fraction = 0.7
embed_lr = 0.35
head_lr = 0.002
vector_lr = 0.0075
weight_decay = 0.05
outer_decay = 0.001
grad_clip = 0.0
beta1 = 0.8
adam_eps = 1e-10
muon_update = "spectral"
even_units = True

vocab_size = 50304
n_head = 6  # of 128 dimensions
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
value_embeds = 2
head_bias = True
logit_softcap = 15
init = "zero"
