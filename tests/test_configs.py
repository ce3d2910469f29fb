"""The runs of config/ are those of the reports that describe them: settings, resolved, against the published ones."""

import pytest
import torch
from conftest import ROOT

from configurator import configure
from dataloader import step_windows
from fineweb import DataConfig
from model import GPT, GPTConfig
from optim import learning_rate
from train_gpt2 import TrainConfig

ADAMW = dict(optimizer="adamw", init_from="scratch", grad_clip=1.0)
GPT2 = dict(pos="learned", norm="layernorm", mlp="gelu", bias=True, n_layer=12, n_head=12, n_embd=768, block_size=1024)
FINE_TUNED = dict(
    init_from="gpt2", dropout=0.1, optimizer="adafactor", learning_rate=5e-5, min_lr=0.0, schedule="linear",
    warmup_fraction=0.1, epochs=1.0, max_steps=None, weight_decay=0.0, grad_clip=0.0, total_batch_size=None,
)  # fmt: skip
FINEWEB_EDU = dict(
    data_dir="data/fineweb_edu10B", vocab_size=50304, total_batch_size=524288, batch_size=32, beta1=0.9, beta2=0.95,
    weight_decay=0.1, schedule="cosine", val_interval=250, hellaswag_interval=250, checkpoint_interval=5000,
    dropout=0.0, tie_weights=True,
)  # fmt: skip
TWO_CARDS = dict(
    vocab_size=50257, block_size=1024, qkv_bias=False, tie_weights=False, schedule="constant", warmup_steps=0,
    weight_decay=0.01, beta1=0.9, beta2=0.999, total_batch_size=None, max_hours=24.0,
    data_dir="data/smollm_fineweb_edu_dedup",
)  # fmt: skip
REPORTED = {
    "gpt2_dutch": ADAMW | GPT2 | dict(
        vocab_size=52000, block_size=512, dropout=0.1, tie_weights=True, learning_rate=1e-4, min_lr=0.0, warmup_steps=0,
        schedule="cosine", max_steps=93192, weight_decay=0.01, beta1=0.9, beta2=0.999, batch_size=8,
        total_batch_size=16 * 8 * 2 * 512,
    ),
    "gpt2_medium": ADAMW | TWO_CARDS | dict(n_layer=24, n_head=16, n_embd=1024, learning_rate=1e-4, batch_size=4),
    "gpt2_large": ADAMW | TWO_CARDS | dict(n_layer=36, n_head=20, n_embd=1280, learning_rate=5e-5, batch_size=2),
    "shakespeare_124m": ADAMW | GPT2 | dict(
        vocab_size=50257, seq_len=64, batch_size=16, total_batch_size=4096, learning_rate=6e-4, min_lr=6e-5,
        warmup_steps=1000, schedule="cosine", max_steps=300000, target_loss=0.09, weight_decay=0.1, beta1=0.9,
        beta2=0.95, log_interval=100,
    ),
    "finetune_wikitext2": FINE_TUNED | dict(batch_size=8, data_dir="data/wikitext2_detokenized"),
    "finetune_wikitext103": FINE_TUNED | dict(batch_size=8, data_dir="data/wikitext103_detokenized"),
    "finetune_imdb": FINE_TUNED | dict(batch_size=64, data_dir="data/imdb"),
    "gpt2_124m": ADAMW | GPT2 | FINEWEB_EDU | dict(
        learning_rate=6e-4, min_lr=6e-5, warmup_steps=715, max_steps=19073,
    ),
    "gpt2_124m_modern": ADAMW | GPT2 | FINEWEB_EDU | dict(
        pos="rope", rope_base=10000.0, norm="rmsnorm", norm_eps=1.19e-7, mlp="swiglu", learning_rate=1.8e-3,
        min_lr=1.8e-4, warmup_steps=285, max_steps=38146, val_tokens=20 * 32 * 1024, keep_checkpoints=0,
        sample_start="Hello, I'm a language model,", sample_num=4, sample_tokens=32, sample_top_k=50,
        sample_temperature=1.0,
    ),
    "shakespeare_gpu": dict(  # nanoGPT's baby GPT: its size, data, batch and dropout
        n_layer=6, n_head=6, n_embd=384, block_size=256, dropout=0.2, bias=False, batch_size=64,
        total_batch_size=64 * 256, data_dir="data/shakespeare_char", optimizer="muon",
    ),
}  # fmt: skip
PARAMETERS = {
    "gpt2_dutch": 125_385_216, "gpt2_medium": 406_212_608, "gpt2_large": 838_220_800, "shakespeare_124m": 124_439_808,
    "gpt2_124m": 124_475_904, "gpt2_124m_modern": 123_682_560, "tinystories": 29_368_832,
}  # fmt: skip
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


def resolved(name):
    config, gpt_config, _ = configure(TrainConfig, GPTConfig, argv=[str(ROOT / f"config/{name}.py")])
    return config, gpt_config


@pytest.mark.parametrize("name", REPORTED)
def test_settings(name):
    config, gpt_config = resolved(name)
    have = vars(config) | vars(gpt_config)
    assert {option: have[option] for option in REPORTED[name]} == REPORTED[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name):
    with torch.device("meta"):
        assert GPT(resolved(name)[1]).num_params() == PARAMETERS[name]


@pytest.mark.parametrize("name", DATA)
def test_data(name):
    config, _ = configure(DataConfig, argv=[str(ROOT / f"config/data/{name}.py")])
    assert {option: getattr(config, option) for option in DATA[name]} == DATA[name]


def test_epochs_of_the_play():
    """As in the report, 1,000 steps on all of its 338,025 tokens are 12.1 epochs."""
    config, _ = resolved("shakespeare_124m")
    rows, windows, epochs = config.total_batch_size // config.seq_len, (338_025 - 1) // config.seq_len, 0
    for step in range(1, 1001):
        epochs += len(step_windows(step, rows, windows, 1)) / windows
    assert epochs == pytest.approx(12.1, abs=0.05)
    assert "12.1 epochs" in (ROOT / "config/shakespeare_124m.py").read_text()
    data, _ = configure(DataConfig, argv=[str(ROOT / "config/data/shakespeare_all.py")])
    assert (config.val_interval, data.val_fraction, data.out_dir) == (0, 0, config.data_dir)


def test_the_modern_run_has_eight_checkpoints():
    config, _ = resolved("gpt2_124m_modern")
    assert len({*range(5000, config.max_steps + 1, config.checkpoint_interval), config.max_steps}) == 8


def test_arithmetic_of_the_half_hour():
    """What the comment of config/tinystories.py says: FLOP a token, tokens, and minutes on three cards."""
    config, gpt_config = resolved("tinystories")
    with torch.device("meta"):
        flops = GPT(gpt_config).flops_per_token(gpt_config.block_size)
    tokens = config.max_steps * config.total_batch_size
    said = (ROOT / "config/tinystories.py").read_text()
    assert f"= {flops / 1e6:.0f} MFLOP, all {tokens / 1e6:.0f}M tokens" in said.replace("\n# ", " ")
    minutes = [flops * tokens / (0.35 * peak * 1e12) / 60 for peak in (165, 312, 989)]
    assert (
        "165 TFLOP/s that is {:.0f} minutes, of an A100's 312 {:.0f}, of an H100's 989 {:.0f}".format(*minutes) in said
    )


def test_constant_and_cosine_ends():
    for name, first, last in (("gpt2_dutch", 1e-4, 0.0), ("gpt2_124m", 6e-4 / 715, 6e-5), ("gpt2_medium", 1e-4, 1e-4)):
        config, _ = resolved(name)
        steps = config.max_steps or 1000
        rate = [
            learning_rate(
                step, config.schedule, config.learning_rate, config.min_lr, config.warmup_steps, steps,
                config.decay_fraction,
            )
            for step in (1, steps)
        ]  # fmt: skip
        assert rate == pytest.approx([first, last], rel=1e-3, abs=1e-12)
