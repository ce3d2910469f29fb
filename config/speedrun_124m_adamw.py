# The speed run's model with AdamW alone, tuned as well: the yardstick for its optimizers. modded-nanogpt's optimizer
# track has 3.28 after 4,950 steps. Not yet run here at this size.
#     python fineweb.py config/data/fineweb10B.py
#     torchrun --nproc_per_node=8 train_gpt2.py config/speedrun_124m_adamw.py
out_dir = "out/speedrun_124m_adamw"
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
max_steps = 4950  # 2.6B tokens

learning_rate = 0.001  # of the blocks' matrices
embed_lr = 0.7
head_lr = 0.004
vector_lr = 0.015
min_lr = 0.0
warmup_steps = 100
schedule = "wsd"
decay_fraction = 0.7
weight_decay = 1.0
outer_decay = 0.002
beta1 = 0.9
beta2 = 0.9
adam_eps = 1e-10
grad_clip = 0.0

val_interval = 125
checkpoint_interval = 500
