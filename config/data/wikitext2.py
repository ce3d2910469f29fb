# WikiText-2, raw: 11 MB of Wikipedia articles, about 2.4M tokens, as one document. For
# papers' numbers, of the test set: --val_split=test --out_dir=data/wikitext2_test.
#     python fineweb.py config/data/wikitext2.py
dataset = "Salesforce/wikitext"
subset = "wikitext-2-raw-v1"
join = True
val_split = "validation"
out_dir = "data/wikitext2"
