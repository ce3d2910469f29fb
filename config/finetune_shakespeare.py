# GPT-2 fine-tuned on tiny Shakespeare.
#     python fineweb.py config/data/shakespeare.py
#     python train_gpt2.py config/finetune_shakespeare.py
#     python sample.py --model=out/finetune_shakespeare --start="ROMEO:"
# Estimated: the settings of finetune_wikitext2.py; nobody has published a loss.

out_dir = "out/finetune_shakespeare"
data_dir = "data/shakespeare"
init_from = "gpt2"

batch_size = 8
total_batch_size = None  # one micro-batch
epochs = 1

val_interval = 10
sample_interval = 20
sample_start = "ROMEO:"

optimizer = "adafactor"  # clips its own updates
learning_rate = 5e-5
min_lr = 0.0
warmup_steps = 0.1  # of all steps
schedule = "linear"
weight_decay = 0.0
grad_clip = 0.0

dropout = 0.1
