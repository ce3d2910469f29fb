# The size of every run here: 1.3 to 2.9M parameters, 4,096 own ids, contexts of 128, steps of 2,048 tokens.
vocab_size = 4096
n_layer = 4
n_head = 2
n_embd = 128
block_size = 128
batch_size = 16
total_batch_size = 2048
max_steps = 400

device = "cpu"
dtype = "bfloat16"
compile = True
val_tokens = 131072
val_interval = 100
hellaswag_interval = 0
sample_interval = 0
checkpoint_interval = 200
keep_checkpoints = 1
log_interval = 20
