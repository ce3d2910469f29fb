# The simple speed-run recipe of modded-nanogpt's optimizer track: few steps to GPT-2's loss.
#     python fineweb.py config/data/fineweb10B.py
#     torchrun --nproc_per_node=8 train_gpt2.py config/speedrun_124m.py
# Published: val loss 3.28 after 3,250 steps of 524,288 tokens, where llm.c takes 17,250.

out_dir = "out/speedrun_124m"
data_dir = "data/fineweb10B"

batch_size = 32
max_steps = 3250  # 1.7B tokens

val_interval = 125
checkpoint_interval = 500

optimizer = "muon"
learning_rate = 0.025  # of the blocks' matrices
min_lr = 0.0
warmup_steps = 0
schedule = "wsd"
decay_fraction = 0.7
embed_lr = 0.7
head_lr = 0.004
vector_lr = 0.015
weight_decay = 0.05
outer_decay = 0.001
grad_clip = 0.0
beta1 = 0.8
adam_eps = 1e-10
muon_update = "spectral"

vocab_size = 50304
n_head = 6  # of 128 dimensions
pos = "rope"
norm = "rmsnorm"
mlp = "relu2"
norm_eps = 1.19e-7
rope_base = 1024
rope_fraction = 0.5
tie_weights = False
qk_norm = True
attn_scale = 0.12
embed_norm = True
head_bias = True
logit_softcap = 15
init = "zero"
