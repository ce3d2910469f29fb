# GPT-2 fine-tuned on WikiText-103, val being its test set.
#     python fineweb.py config/data/wikitext103_detokenized.py
#     python train_gpt2.py config/finetune_wikitext103.py
out_dir = "out/finetune_wikitext103"
data_dir = "data/wikitext103_detokenized"
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

val_interval = 2000
