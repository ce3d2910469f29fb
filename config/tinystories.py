# Whole stories from 29M parameters in half an hour of one GPU.
#     python tokenizer.py --dataset=roneneldan/TinyStories --vocab_size=8192 --out=tinystories.json
#     python fineweb.py config/data/tinystories.py
#     python train_gpt2.py config/tinystories.py
#     python sample.py --model=out/tinystories --start="Once upon a time"
# Estimated: a token costs 6 x 29.4M + 12 x 8 layers x 512 wide x 512 long = 201 MFLOP, all 524M
# tokens 1.06e17 FLOP. At 35% of an RTX 4090's 165 TFLOP/s that is 30 minutes, of an A100's 312 16,
# of an H100's 989 5.
# huggingface.py exports it with its own code; with --mlp=swiglu --qk_norm=False it is a Llama.

out_dir = "out/tinystories"
data_dir = "data/tinystories"

batch_size = 64
total_batch_size = 2 * 64 * 512
max_steps = 8000  # about one epoch

val_interval = 500
val_tokens = 1048576
sample_interval = 1000
sample_start = "Once upon a time"

optimizer = "muon"
learning_rate = 3e-3
min_lr = 1e-4
warmup_steps = 100
schedule = "linear"

block_size = 512
vocab_size = 8192
n_layer = 8
n_head = 8
n_embd = 512
bias = False
pos = "rope"
norm = "rmsnorm"
mlp = "relu2"
qk_norm = True
