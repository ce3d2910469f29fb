# GPT-2 medium from scratch for 24 hours, on two cards of 24 GB: no biases on q, k and v, and an output head of its own.
#     python fineweb.py config/data/smollm_fineweb_edu_dedup.py
#     torchrun --nproc_per_node=2 train_gpt2.py config/gpt2_medium.py
out_dir = "out/gpt2_medium"
data_dir = "data/smollm_fineweb_edu_dedup"

n_layer = 24
n_head = 16
n_embd = 1024
qkv_bias = False
tie_weights = False

batch_size = 4  # 11 GB on each card: foreseen, not measured (14: 20; with both memory options 64: 13)
total_batch_size = None  # one micro-batch on each card
max_hours = 24.0

learning_rate = 1e-4
min_lr = 1e-4
schedule = "constant"
warmup_steps = 0
weight_decay = 0.01
beta2 = 0.999
grad_clip = 1.0

val_interval = 1000
sample_interval = 1000
checkpoint_interval = 5000
