"""Every config loads, says what it is in the same form, and sets what the report behind it says."""

import re

import pytest
import torch
from conftest import ROOT

from configurator import configure
from fineweb import DataConfig
from model import GPT, GPTConfig
from train_gpt2 import TrainConfig

NAMES = sorted(path.stem for path in (ROOT / "config").glob("*.py"))
GPT2 = dict(
    init_from="scratch", optimizer="adamw", grad_clip=1.0, pos="learned", norm="layernorm", mlp="gelu", bias=True,
    n_layer=12, n_head=12, n_embd=768, block_size=1024,
)  # fmt: skip
FINE_TUNED = dict(
    init_from="gpt2", dropout=0.1, optimizer="adafactor", learning_rate=5e-5, min_lr=0.0, schedule="linear",
    warmup_steps=0.1, epochs=1.0, max_steps=None, weight_decay=0.0, grad_clip=0.0, total_batch_size=None,
)  # fmt: skip
FINEWEB_EDU = GPT2 | dict(
    data_dir="data/fineweb_edu10B", vocab_size=50304, total_batch_size=524288, batch_size=32, beta1=0.9, beta2=0.95,
    weight_decay=0.1, schedule="cosine", val_interval=250, hellaswag_interval=250, checkpoint_interval=5000,
)  # fmt: skip
TWO_CARDS = GPT2 | dict(
    vocab_size=50257, qkv_bias=False, tie_weights=False, schedule="constant", warmup_steps=0, weight_decay=0.01,
    beta1=0.9, beta2=0.999, total_batch_size=None, max_hours=24.0, data_dir="data/smollm_fineweb_edu_dedup",
)  # fmt: skip
REPORTED = {  # REFERENCE.md's five reports, and nanoGPT's baby GPT
    "gpt2_dutch": GPT2 | dict(
        vocab_size=52000, block_size=512, dropout=0.1, tie_weights=True, learning_rate=1e-4, min_lr=0.0, warmup_steps=0,
        schedule="cosine", max_steps=93192, weight_decay=0.01, beta1=0.9, beta2=0.999, batch_size=8,
        total_batch_size=16 * 8 * 2 * 512,
    ),
    "gpt2_medium": TWO_CARDS | dict(n_layer=24, n_head=16, n_embd=1024, learning_rate=1e-4, min_lr=1e-4, batch_size=4),
    "gpt2_large": TWO_CARDS | dict(n_layer=36, n_head=20, n_embd=1280, learning_rate=5e-5, min_lr=5e-5, batch_size=2),
    "shakespeare_124m": GPT2 | dict(
        vocab_size=50257, seq_len=64, batch_size=16, total_batch_size=4096, learning_rate=6e-4, min_lr=6e-5,
        warmup_steps=1000, schedule="cosine", max_steps=300000, target_loss=0.09, weight_decay=0.1, beta1=0.9,
        beta2=0.95, log_interval=100,
    ),
    "finetune_wikitext2": FINE_TUNED | dict(batch_size=8, data_dir="data/wikitext2_detokenized"),
    "finetune_wikitext103": FINE_TUNED | dict(batch_size=8, data_dir="data/wikitext103_detokenized"),
    "finetune_imdb": FINE_TUNED | dict(batch_size=64, data_dir="data/imdb"),
    "gpt2_124m": FINEWEB_EDU | dict(learning_rate=6e-4, min_lr=6e-5, warmup_steps=715, max_steps=19073),
    "gpt2_124m_modern": FINEWEB_EDU | dict(
        pos="rope", rope_base=10000.0, norm="rmsnorm", norm_eps=1.19e-7, mlp="swiglu", mlp_hidden=2048,
        learning_rate=1.8e-3, min_lr=1.8e-4, warmup_steps=285, max_steps=38146, val_tokens=20 * 32 * 1024,
        keep_checkpoints=0, sample_start="Hello, I'm a language model,",
    ),
    "shakespeare_gpu": dict(
        n_layer=6, n_head=6, n_embd=384, block_size=256, dropout=0.2, bias=False, batch_size=64,
        total_batch_size=64 * 256, data_dir="data/shakespeare_char", optimizer="muon",
    ),
}  # fmt: skip
PARAMETERS = {
    "gpt2_dutch": 125_385_216, "gpt2_medium": 406_212_608, "gpt2_large": 838_220_800, "shakespeare_124m": 124_439_808,
    "gpt2_124m": 124_475_904, "gpt2_124m_modern": 123_682_560, "tinystories": 29_368_832,
}  # fmt: skip


def resolved(name, *flags):
    return configure(TrainConfig, GPTConfig, argv=[str(ROOT / f"config/{name}.py"), *flags])


def options(name):
    config, gpt_config, given = resolved(name)
    return vars(config) | vars(gpt_config), given


@pytest.mark.parametrize("name", NAMES)
def test_settings(name):
    """Those of its report; what no report names is not set to what it is by default."""
    reported, (have, given) = REPORTED.get(name, {}), options(name)
    assert {option: have[option] for option in reported} == reported
    default = vars(TrainConfig()) | vars(GPTConfig())
    repeated = {option for option in given if have[option] == default[option]}
    assert repeated <= reported.keys() | {"out_dir", "data_dir"}
    if name in PARAMETERS:
        with torch.device("meta"):
            assert GPT(resolved(name)[1]).num_params() == PARAMETERS[name]


@pytest.mark.parametrize("name", NAMES)
def test_head_and_data(name):
    """What it is, the commands for data and run, and whether its result is measured, published or estimated. The
    data command makes the folder that the run reads, and its vocabulary fits."""
    text, (have, _) = (ROOT / f"config/{name}.py").read_text(), options(name)
    head = text.partition("\n\n")[0].partition("\nimport")[0]
    assert have["out_dir"].startswith("out/")
    data = re.search(r"#     python fineweb\.py (config/data/\w+\.py|--files=\S+ --out_dir=data/notes)\b", head)
    assert re.search(rf"#     .*(train_gpt2\.py|\\\n#  *) ?config/{name}\.py\b", head[data.end() :])
    if name != "shakespeare_124m":
        assert re.search(r"^# (Measured|Published|Estimated): \w", head, re.MULTILINE)
    for record in re.findall(r"records/[\w-]+", text):
        assert (ROOT / record / "README.md").exists()
    if data[1].startswith("config"):
        data_config, _ = configure(DataConfig, argv=[str(ROOT / data[1])])
        assert data_config.out_dir == have["data_dir"]
        ids = {"gpt2": 50257, "bytes": 257, "dutch.json": 52000, "tinystories.json": 8192}[data_config.tokenizer]
        assert have["vocab_size"] >= ids


DATA = {
    "dutch": dict(tokenizer="dutch.json", out_dir="data/dutch"),  # of another source, as the config says
    "smollm_fineweb_edu_dedup": dict(dataset="HuggingFaceTB/smollm-corpus", subset="fineweb-edu-dedup"),
    "wikitext2_detokenized": dict(val_split="test", join=True, detokenize="wikitext"),
    "wikitext103_detokenized": dict(val_split="test", join=True, detokenize="wikitext"),
    "imdb": dict(dataset="stanfordnlp/imdb", split="train+test", val_fraction=0.1, val_seed=1),
    "openwebtext": dict(dataset="Skylion007/openwebtext", val_fraction=0.0005, val_seed=2357),
    "tinystories": dict(dataset="roneneldan/TinyStories", val_split="validation", tokenizer="tinystories.json"),
    "fineweb_edu": dict(dataset="HuggingFaceFW/fineweb-edu", subset="sample-10BT", val_split=None, val_fraction=None),
}


@pytest.mark.parametrize("path", sorted((ROOT / "config/data").glob("*.py")), ids=lambda path: path.stem)
def test_data(path):
    config, _ = configure(DataConfig, argv=[str(path)])
    want = DATA.get(path.stem, {})
    assert {option: getattr(config, option) for option in want} == want
