# GPT-2 124M as published, trained on 10B tokens of FineWeb-Edu.
#     python fineweb.py config/data/fineweb_edu.py
#     torchrun --nproc_per_node=8 train_gpt2.py config/gpt2_124m.py
#     python train_gpt2.py config/gpt2_124m.py     # one GPU: the same steps and losses, 8 x as long
# Published: val loss 3.03 to 3.09, HellaSwag 0.301 to 0.306 (build-nanogpt, 8 x A100).

out_dir = "out/gpt2_124m"
data_dir = "data/fineweb_edu10B"

batch_size = 32  # 17 GB (16: 9 GB, 64: 34 GB, by arithmetic); the losses do not depend on it
total_batch_size = 524288
max_steps = 19073  # one epoch

val_interval = 250
hellaswag_interval = 250
sample_interval = 1000
checkpoint_interval = 5000

learning_rate = 6e-4
min_lr = 6e-5
warmup_steps = 715
weight_decay = 0.1
grad_clip = 1.0
beta1 = 0.9
beta2 = 0.95

vocab_size = 50304  # GPT-2's 50257, rounded up to a multiple of 128
