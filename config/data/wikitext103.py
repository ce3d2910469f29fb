# WikiText-103, raw: 540 MB of Wikipedia articles, about 120M tokens, as one document. For
# papers' numbers, of the test set: --val_split=test --out_dir=data/wikitext103_test.
#     python fineweb.py config/data/wikitext103.py
dataset = "Salesforce/wikitext"
subset = "wikitext-103-raw-v1"
join = True
val_split = "validation"
out_dir = "data/wikitext103"
