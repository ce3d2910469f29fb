# FineWeb-2 in Dutch, by a vocabulary of its own. Its other languages: --subset=deu_Latn, and so on.
# (The report's run had OSCAR 21.09, which one has to ask for.)
#     python tokenizer.py --dataset=HuggingFaceFW/fineweb-2 --subset=nld_Latn --vocab_size=52000 --out=dutch.json
#     python fineweb.py config/data/dutch.py
dataset = "HuggingFaceFW/fineweb-2"
subset = "nld_Latn"
tokenizer = "dutch.json"
out_dir = "data/dutch"
