# GPT-2 fine-tuned on WikiText-2, val being its test set: reported are val losses (word losses) of 3.03 (3.40) at a
# context of 256, 2.94 (3.31) at 512 and 2.87 (3.22) at 1024; see records/2026-11-20_finetune_table.
#     python fineweb.py config/data/wikitext2_detokenized.py
#     python train_gpt2.py config/finetune_wikitext2.py
#     python train_gpt2.py config/finetune_wikitext2.py --init_from=gpt2-medium --block_size=512 --out_dir=out/medium
# Where memory runs out: --batch_size=2 --total_batch_size=8192 (8 x 1024, 4 micro-batches).
out_dir = "out/finetune_wikitext2"
data_dir = "data/wikitext2_detokenized"
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

val_interval = 100
