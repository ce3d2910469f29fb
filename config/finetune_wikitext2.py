# GPT-2 fine-tuned on WikiText-2. Its test set is the validation set, as in the published table.
#     python fineweb.py config/data/wikitext2_detokenized.py
#     python train_gpt2.py config/finetune_wikitext2.py
#     python train_gpt2.py config/finetune_wikitext2.py --init_from=gpt2-medium --block_size=512 --out_dir=out/medium
# Published: val loss (word loss) 3.03 (3.40) at a context of 256, 2.94 (3.31) at 512, 2.87 (3.22)
# at 1024.
# If memory runs out: --batch_size=2 --total_batch_size=8192, the same steps in 4 micro-batches.

out_dir = "out/finetune_wikitext2"
data_dir = "data/wikitext2_detokenized"
init_from = "gpt2"

batch_size = 8
total_batch_size = None  # one micro-batch
epochs = 1

val_interval = 100

optimizer = "adafactor"  # clips its own updates
learning_rate = 5e-5
min_lr = 0.0
warmup_steps = 0.1  # of all steps
schedule = "linear"
weight_decay = 0.0
grad_clip = 0.0

dropout = 0.1
