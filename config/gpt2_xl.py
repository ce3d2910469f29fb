# GPT-2 XL, 1.56B parameters, from scratch on FineWeb-Edu, on 8 cards of 80 GB; rate and weight decay as GPT-3 XL's
# (Brown et al. 2020, arXiv 2005.14165, table 2.1).
#     python fineweb.py config/data/fineweb_edu100B.py
#     torchrun --nproc_per_node=8 train_gpt2.py config/gpt2_xl.py
out_dir = "out/gpt2_xl"
data_dir = "data/fineweb_edu100B"

vocab_size = 50304
n_layer = 48
n_head = 25
n_embd = 1600

batch_size = 8  # 49 GB on each card: foreseen, not measured (16: 70; with both memory options 27 and 29)
total_batch_size = 1048576
max_steps = 30000  # 31B tokens, 20 for each parameter

learning_rate = 2e-4
min_lr = 2e-5
warmup_steps = 360  # 375M tokens
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0

val_interval = 250
hellaswag_interval = 1000
sample_interval = 1000
checkpoint_interval = 1000
