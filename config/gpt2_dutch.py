# A GPT of your own language and vocabulary: 125M parameters, 52,000 ids, a context of 512, 16 GPUs.
#     python fineweb.py config/data/dutch.py       # after its tokenizer, see there
#     torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train_gpt2.py \
#         config/gpt2_dutch.py
# Published: plots of the loss, and samples of an earlier program with a fault in its targets.

out_dir = "out/gpt2_dutch"
data_dir = "data/dutch"

batch_size = 8  # on each of 16 GPUs, twice a step; 4 GB (by arithmetic)
total_batch_size = 256 * 512
max_steps = 93192

val_interval = 1000
sample_interval = 1000
checkpoint_interval = 5000

learning_rate = 1e-4
min_lr = 0.0
warmup_steps = 0
weight_decay = 0.01
beta2 = 0.999

block_size = 512
vocab_size = 52000
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.1
tie_weights = True
