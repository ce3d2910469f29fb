# Tiny Shakespeare by characters on one GPU, in the size of nanoGPT's baby GPT: 10.7M parameters. Its best val loss is
# 1.4697, within 5,000 steps of as many tokens, about three minutes of an A100; here Muon takes 1,500 steps.
# Not measured on a GPU. By arithmetic: 71 MFLOP a token, 1.16 TFLOP a step, 12 ms at 30% of an A100's 312 TFLOP/s, so
# about 20 seconds and the compilation.
#     python fineweb.py config/data/shakespeare_char.py
#     python train_gpt2.py config/shakespeare_gpu.py
# huggingface.py exports it with its own code. With --mlp=swiglu --qk_norm=False it is a LlamaForCausalLM instead.
# The val loss may rise before the end; sample.py out/shakespeare_gpu --best=True takes the checkpoint of the lowest.
out_dir = "out/shakespeare_gpu"
data_dir = "data/shakespeare_char"

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

batch_size = 64
total_batch_size = 64 * 256
max_steps = 1500
optimizer = "muon"
learning_rate = 4e-3
min_lr = 1e-4
warmup_steps = 50
schedule = "linear"

val_interval = 100
sample_interval = 500
sample_start = "ROMEO:"
checkpoint_interval = 100
