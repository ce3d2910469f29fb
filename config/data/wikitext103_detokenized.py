# WikiText-103 in the same way: with <unk>, without the spaces between its words, its test set as val.
#     python fineweb.py config/data/wikitext103_detokenized.py
dataset = "Salesforce/wikitext"
subset = "wikitext-103-v1"
join = True
detokenize = "wikitext"
val_split = "test"
out_dir = "data/wikitext103_detokenized"
