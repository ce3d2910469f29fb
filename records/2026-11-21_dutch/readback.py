"""Does transformers read an export as we do? python readback.py RUN_FOLDER HF_FOLDER GLOB"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[2]))

from documents import documents

from huggingface import load_model
from sample import generate
from tokenizer import get_tokenizer

run, folder, pattern = sys.argv[1:]
model, tokenizer, path = load_model(run, torch.device("cpu"))
enc, model = get_tokenizer(tokenizer), model.eval()
theirs, their_enc = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
texts = list(documents(pattern))
ids = [enc.encode_ordinary(text) for text in texts]
differ = sum(a != their_enc(text)["input_ids"] for a, text in zip(ids, texts, strict=True))
decoded = sum(their_enc.decode(a) != text for a, text in zip(ids, texts, strict=True))
print(f"{type(theirs).__name__}: ids differ in {differ}, decoded text in {decoded} of {len(texts)} documents")

T = model.config.block_size
x = torch.tensor([a[:T] for a in ids if len(a) >= T][:8])  # their logits are 200 MB
with torch.inference_mode():
    ours, others = model(x), theirs(x).logits
worst, largest = (ours - others).abs().max(), ours.abs().max()
print(f"logits of {tuple(ours.shape)}: largest difference {worst:.1e}, largest {largest:.1f}")
same = 0
for row in x[:, :16]:
    greedy = torch.cat(list(generate(model, row[None], 64, temperature=0.0, eot=enc.eot_token)))
    made = theirs.generate(row[None], max_new_tokens=64, do_sample=False, pad_token_id=enc.eot_token)[0, 16:]
    same += greedy.tolist() == made.tolist()
print(f"greedy continuations of 64 tokens that are equal: {same} of {len(x)}")
