# A GPT of one's own language, by its own vocabulary: 125M parameters with 52,000 ids and a context of 512, on 16 GPUs.
#     python fineweb.py config/data/dutch.py       # after its tokenizer, see there
#     torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train_gpt2.py \
#         config/gpt2_dutch.py
out_dir = "out/gpt2_dutch"
data_dir = "data/dutch"

vocab_size = 52000
block_size = 512
dropout = 0.1

batch_size = 8  # on each of 16 GPUs, twice a step; 4 GB: foreseen, not measured
total_batch_size = 131072  # 256 sequences
max_steps = 93192

learning_rate = 1e-4
min_lr = 0.0
warmup_steps = 0
weight_decay = 0.01
beta2 = 0.999
grad_clip = 1.0

val_interval = 1000
sample_interval = 1000
checkpoint_interval = 5000
