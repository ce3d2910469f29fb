# GPT-2 fine-tuned on film reviews.
#     python fineweb.py config/data/imdb.py
#     python train_gpt2.py config/finetune_imdb.py
# Published: val loss (word loss) 3.58 (4.61) at a context of 256, 3.55 (4.57) at 512, 3.52 (4.54)
# at 1024.
# If memory runs out: --batch_size=16 --total_batch_size=65536, the same steps in 4 micro-batches.

out_dir = "out/finetune_imdb"
data_dir = "data/imdb"
init_from = "gpt2"

batch_size = 64  # with 8 the loss rises
total_batch_size = None  # one micro-batch
epochs = 1

val_interval = 50

optimizer = "adafactor"  # clips its own updates
learning_rate = 5e-5
min_lr = 0.0
warmup_steps = 0.1  # of all steps
schedule = "linear"
weight_decay = 0.0
grad_clip = 0.0

dropout = 0.1
