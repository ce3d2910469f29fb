# Tiny Shakespeare by characters on one GPU, at the size of nanoGPT's baby GPT: 10.7M parameters.
#     python fineweb.py config/data/shakespeare_char.py
#     python train_gpt2.py config/shakespeare_gpu.py
#     python sample.py out/shakespeare_gpu --best=True  # the val loss may rise again before the end
# Estimated: 20 s of an A100 (1.16 TFLOP a step, 30% of 312 TFLOP/s) and a minute to compile.
# Published: nanoGPT's best val loss is 1.4697, within 5,000 steps or 3 minutes of an A100.
# huggingface.py exports it with its own code; with --mlp=swiglu --qk_norm=False it is a Llama.

out_dir = "out/shakespeare_gpu"
data_dir = "data/shakespeare_char"

batch_size = 64
total_batch_size = 64 * 256
max_steps = 1500

val_interval = 100
sample_interval = 500
sample_start = "ROMEO:"
checkpoint_interval = 100

optimizer = "muon"
learning_rate = 4e-3
min_lr = 1e-4
warmup_steps = 50
schedule = "linear"

block_size = 256
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2
bias = False
pos = "rope"
norm = "rmsnorm"
mlp = "relu2"
qk_norm = True
