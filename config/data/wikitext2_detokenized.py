# WikiText-2 with <unk>, without the spaces between its words, and its *test* set as val: what the
# usual tables of fine-tuned GPT-2s are of. val is 278,366 tokens and 245,566 words.
#     python fineweb.py config/data/wikitext2_detokenized.py
dataset = "Salesforce/wikitext"
subset = "wikitext-2-v1"
join = True
detokenize = "wikitext"
val_split = "test"
out_dir = "data/wikitext2_detokenized"
