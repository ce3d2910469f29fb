# GPT-2 124M as published, on 10B tokens of FineWeb-Edu.
#     python fineweb.py config/data/fineweb_edu.py
#     torchrun --nproc_per_node=8 train_gpt2.py config/gpt2_124m.py
# On one GPU: python train_gpt2.py config/gpt2_124m.py. The same steps and losses, eight times as long.
out_dir = "out/gpt2_124m"
data_dir = "data/fineweb_edu10B"

vocab_size = 50304  # GPT-2's 50257 rounded up to a multiple of 128

batch_size = 32  # 17 GB, for a card of 24 (16: 9 GB, for 12; 64: 34 GB, for 40 and more); the result stays the same
total_batch_size = 524288
max_steps = 19073  # one epoch of 10B tokens

learning_rate = 6e-4
min_lr = 6e-5
warmup_steps = 715
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0

val_interval = 250
hellaswag_interval = 250
sample_interval = 1000
checkpoint_interval = 5000
