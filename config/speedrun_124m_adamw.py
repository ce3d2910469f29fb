# The model of speedrun_124m.py with a tuned AdamW alone: what its optimizers are worth.
#     python fineweb.py config/data/fineweb10B.py
#     torchrun --nproc_per_node=8 train_gpt2.py config/speedrun_124m_adamw.py
# Published: val loss 3.28 after 4,950 steps of 524,288 tokens (modded-nanogpt's optimizer track).
# There the embedding, the head and the vectors had betas of 0.8 and 0.95; here all parameters have
# the matrices'.

out_dir = "out/speedrun_124m_adamw"
data_dir = "data/fineweb10B"

batch_size = 32
max_steps = 4950  # 2.6B tokens

val_interval = 125
checkpoint_interval = 500

learning_rate = 0.001  # of the blocks' matrices
min_lr = 0.0
warmup_steps = 100
schedule = "wsd"
decay_fraction = 0.7
embed_lr = 0.7
head_lr = 0.004
vector_lr = 0.015
weight_decay = 1.0
outer_decay = 0.002
grad_clip = 0.0
beta2 = 0.9
adam_eps = 1e-10

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
