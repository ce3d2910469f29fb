# GPT-2 fine-tuned on WikiText-103. Its test set is the validation set, as for WikiText-2.
#     python fineweb.py config/data/wikitext103_detokenized.py
#     python train_gpt2.py config/finetune_wikitext103.py
# Published: the settings of finetune_wikitext2.py.

out_dir = "out/finetune_wikitext103"
data_dir = "data/wikitext103_detokenized"
init_from = "gpt2"

batch_size = 8
total_batch_size = None  # one micro-batch
epochs = 1

val_interval = 2000

optimizer = "adafactor"  # clips its own updates
learning_rate = 5e-5
min_lr = 0.0
warmup_steps = 0.1  # of all steps
schedule = "linear"
weight_decay = 0.0
grad_clip = 0.0

dropout = 0.1
