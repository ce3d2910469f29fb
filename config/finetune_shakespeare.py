# GPT-2 fine-tuned on tiny Shakespeare.
#     python fineweb.py config/data/shakespeare.py
#     python train_gpt2.py config/finetune_shakespeare.py
#     python sample.py --model=out/finetune_shakespeare --start="ROMEO:"
out_dir = "out/finetune_shakespeare"
data_dir = "data/shakespeare"
init_from = "gpt2"
dropout = 0.1

batch_size = 8  # x 1024 tokens a step
total_batch_size = None  # one micro-batch, whatever block_size is
epochs = 1

optimizer = "adafactor"  # without a first moment; it clips its own updates, at an RMS of 1
learning_rate = 5e-5
min_lr = 0.0
schedule = "linear"
warmup_steps = 0.1  # of all steps
weight_decay = 0.0
grad_clip = 0.0

val_interval = 10
sample_interval = 20
sample_start = "ROMEO:"
