# GPT-2 XL, 1.56B parameters, from scratch on FineWeb-Edu, on 8 cards of 80 GB.
#     python fineweb.py config/data/fineweb_edu100B.py
#     torchrun --nproc_per_node=8 train_gpt2.py config/gpt2_xl.py
# Estimated: learning rate and weight decay are GPT-3 XL's (Brown et al. 2020, arXiv 2005.14165,
# table 2.1).

out_dir = "out/gpt2_xl"
data_dir = "data/fineweb_edu100B"

batch_size = 8  # 49 GB on each card (16: 70 GB, by arithmetic)
total_batch_size = 1048576
max_steps = 30000  # 31B tokens, 20 for each parameter

hellaswag_interval = 1000
sample_interval = 1000

learning_rate = 2e-4
min_lr = 2e-5
warmup_steps = 360  # 375M tokens

vocab_size = 50304
n_layer = 48
n_head = 25
n_embd = 1600
