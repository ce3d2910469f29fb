# Three to four minutes on two CPU cores that compute in bfloat16: a 2M-parameter model that writes Python by bytes.
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
value_embeds = 2
embed_norm = True
tie_weights = False
head_bias = True
logit_softcap = 15
init = "zero"

# 500 steps of 4,096 bytes: a sixth of the standard library
batch_size = 16
total_batch_size = 4096
max_steps = 500
optimizer = "muon"
learning_rate = 6e-3  # of the blocks' matrices
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

val_interval = 100
val_tokens = 131072
sample_interval = 250
sample_start = "class "
checkpoint_interval = 100
