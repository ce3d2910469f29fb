# A modern 124M: RoPE, SwiGLU and RMSNorm in place of GPT-2's position table, GELU and LayerNorm; two epochs of 10B
# tokens at three times the learning rate. config/gpt2_124m.py is its baseline.
#     python fineweb.py config/data/fineweb_edu.py
#     torchrun --nproc_per_node=8 train_gpt2.py config/gpt2_124m_modern.py
out_dir = "out/gpt2_124m_modern"
data_dir = "data/fineweb_edu10B"

vocab_size = 50304
pos = "rope"
mlp = "swiglu"  # hidden width 2048 = 8/3 x 768
norm = "rmsnorm"
norm_eps = 1.19e-7  # float32's epsilon, torch's default

batch_size = 32  # 18 GB, for a card of 24 (64: 36 GB, for 40 and more); the result stays the same
total_batch_size = 524288
max_steps = 38146  # two epochs

learning_rate = 1.8e-3
min_lr = 1.8e-4
warmup_steps = 285
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0

val_interval = 250
hellaswag_interval = 250
val_tokens = 655360  # 20 x 32 x 1024
sample_interval = 1000
sample_start = "Hello, I'm a language model,"
sample_num = 4
sample_tokens = 32
sample_temperature = 1.0
sample_top_k = 50  # with sample.py's seed on all ranks; the report's had 42 + rank
checkpoint_interval = 5000
keep_checkpoints = 0  # all 8
