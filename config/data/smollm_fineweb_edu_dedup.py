# FineWeb-Edu without its duplicates, from SmolLM's corpus: some 200 billion tokens, 400 GB.
#     python fineweb.py config/data/smollm_fineweb_edu_dedup.py
dataset = "HuggingFaceTB/smollm-corpus"
subset = "fineweb-edu-dedup"
out_dir = "data/smollm_fineweb_edu_dedup"
