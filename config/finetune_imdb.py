# GPT-2 fine-tuned on film reviews: reported are val losses (word losses) of 3.58 (4.61) at a context of 256,
# 3.55 (4.57) at 512 and 3.52 (4.54) at 1024; see records/2026-11-20_finetune_table.
#     python fineweb.py config/data/imdb.py
#     python train_gpt2.py config/finetune_imdb.py
# Where memory runs out: --batch_size=16 --total_batch_size=65536 (64 x 1024, 4 micro-batches).
out_dir = "out/finetune_imdb"
data_dir = "data/imdb"
init_from = "gpt2"
dropout = 0.1

batch_size = 64  # x 1024 tokens a step; with 8 the loss rises
total_batch_size = None  # one micro-batch, whatever block_size is
epochs = 1

optimizer = "adafactor"  # without a first moment; it clips its own updates, at an RMS of 1
learning_rate = 5e-5
min_lr = 0.0
schedule = "linear"
warmup_steps = 0.1  # of all steps
weight_decay = 0.0
grad_clip = 0.0

val_interval = 50
