# The fewest steps to GPT-2's loss: modded-nanogpt's optimizer track has 3.28 on FineWeb after 3,250 steps of it (llm.c
# after 17,250). Not yet run here at this size.
#     python fineweb.py config/data/fineweb10B.py
#     torchrun --nproc_per_node=8 train_gpt2.py config/speedrun_124m.py
out_dir = "out/speedrun_124m"
data_dir = "data/fineweb10B"

vocab_size = 50304
n_head = 6  # of 128 dimensions
pos = "rope"
rope_fraction = 0.5
rope_base = 1024
qk_norm = True
attn_scale = 0.12
mlp = "relu2"
norm = "rmsnorm"
norm_eps = 1.19e-7
embed_norm = True
tie_weights = False
head_bias = True
logit_softcap = 15
init = "zero"

batch_size = 32
total_batch_size = 524288
max_steps = 3250  # 1.7B tokens

optimizer = "muon"
learning_rate = 0.025  # of the blocks' matrices
embed_lr = 0.7
head_lr = 0.004
vector_lr = 0.015
min_lr = 0.0
warmup_steps = 0
schedule = "wsd"
decay_fraction = 0.7
weight_decay = 0.05
outer_decay = 0.001
beta1 = 0.8
beta2 = 0.95
adam_eps = 1e-10
muon_update = "spectral"
grad_clip = 0.0

val_interval = 125
checkpoint_interval = 500
