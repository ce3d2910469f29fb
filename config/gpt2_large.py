# GPT-2 large for 24 hours on two cards of 24 GB, without biases of q, k and v, and untied.
#     python fineweb.py config/data/smollm_fineweb_edu_dedup.py
#     torchrun --nproc_per_node=2 train_gpt2.py config/gpt2_large.py
# Published: the settings, no loss.

out_dir = "out/gpt2_large"
data_dir = "data/smollm_fineweb_edu_dedup"

parallel = "ddp_bf16"  # without NVLink, gradients in float32 take longer than a step computes
activation_checkpointing = True
chunked_loss = True

batch_size = 2  # 14 GB (18 GB without the two lines above; by arithmetic)
total_batch_size = None  # one micro-batch on each card
max_hours = 24.0

val_interval = 1000
sample_interval = 1000
checkpoint_interval = 5000

learning_rate = 5e-5
min_lr = 5e-5
schedule = "constant"
warmup_steps = 0
weight_decay = 0.01
grad_clip = 1.0
beta2 = 0.999

block_size = 1024
n_layer = 36
n_head = 20
n_embd = 1280
qkv_bias = False
tie_weights = False
