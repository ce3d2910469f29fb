# WikiText-103 with <unk>, without the spaces between its words, and its *test* set as val.
#     python fineweb.py config/data/wikitext103_detokenized.py
dataset = "Salesforce/wikitext"
subset = "wikitext-103-v1"
join = True
detokenize = "wikitext"
val_split = "test"
out_dir = "data/wikitext103_detokenized"
