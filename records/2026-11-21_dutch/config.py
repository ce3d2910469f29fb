# A small Llama-shaped model of Dutch software manuals, by its own 52,000 ids: 700 steps of 512 tokens on one core.
out_dir = "out/dutch"
data_dir = "data/dutch"
device = "cpu"
dtype = "bfloat16"
compile = True

vocab_size = 52000
block_size = 128
n_layer = 4
n_head = 3
n_embd = 192
bias = False
pos = "rope"
norm = "rmsnorm"
mlp = "swiglu"

batch_size = 4
total_batch_size = 512
max_steps = 700
optimizer = "muon"
learning_rate = 4e-3
min_lr = 1e-4
warmup_steps = 20
schedule = "linear"

val_interval = 175
val_tokens = 16384
checkpoint_interval = 175
