# GPT-2 124M on tiny Shakespeare until it is memorised: the first step with a loss below 0.09.
#     python fineweb.py config/data/shakespeare_all.py
#     python train_gpt2.py config/shakespeare_124m.py
# The schedule is laid out for 300,000 steps; the stop comes after some thousand. As in the report's
# run, all 338,025 tokens are for training (12.1 epochs in 1,000 steps).
out_dir = "out/shakespeare_124m"
data_dir = "data/shakespeare_all"

seq_len = 64  # of a block of 1024
batch_size = 16
total_batch_size = 16 * 64 * 4

max_steps = 300000
target_loss = 0.09
learning_rate = 6e-4
min_lr = 6e-5
warmup_steps = 1000
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0

compile = False  # on a GPU of NVIDIA's --compile=True is faster; the report's run was on a Mac's
log_interval = 100
val_interval = 0
sample_interval = 500
sample_start = "First Citizen:"
checkpoint_interval = 500
keep_checkpoints = 1
