# GPT-2 medium for 24 hours on two cards of 24 GB, without biases of q, k and v, and untied.
#     python fineweb.py config/data/smollm_fineweb_edu_dedup.py
#     torchrun --nproc_per_node=2 train_gpt2.py config/gpt2_medium.py
# Published: val loss 3.38.

out_dir = "out/gpt2_medium"
data_dir = "data/smollm_fineweb_edu_dedup"

parallel = "ddp_bf16"  # without NVLink, gradients in float32 take longer than a step computes

batch_size = 4  # 11 GB (14: 20 GB, by arithmetic)
total_batch_size = None  # one micro-batch on each card
max_hours = 24.0

val_interval = 1000
sample_interval = 1000
checkpoint_interval = 5000

learning_rate = 1e-4
min_lr = 1e-4
schedule = "constant"
warmup_steps = 0
weight_decay = 0.01
grad_clip = 1.0
beta2 = 0.999

block_size = 1024
n_layer = 24
n_head = 16
n_embd = 1024
qkv_bias = False
tie_weights = False
