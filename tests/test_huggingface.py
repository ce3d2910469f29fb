"""Weights and tokenizers to and from Hugging Face; the oracle is transformers itself."""

import json
import os
import random
import re
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import tokenizers
import torch
import transformers
from conftest import MODEL, TRAIN, call, metrics, write_shard
from weights import check_same_logits, load_model, starting_weights

import checkpoint
import huggingface
from configurator import UserError
from model import GPT, GPTConfig
from sample import generate
from tokenizer import ENDOFTEXT, get_tokenizer, same_tokenizer, to_json

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
CPU = torch.device("cpu")
LLAMA = dict(pos="rope", norm="rmsnorm", mlp="swiglu")


def stir(model):
    """Biases and norm gains away from 0 and 1, so that they are tested too."""
    torch.manual_seed(0)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model.eval()


def gpt2(**more):
    config = dict(vocab_size=101, n_positions=24, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    return stir(transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**config, **more})))


def llama(**more):
    config = dict(
        vocab_size=101, max_position_embeddings=24, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, pad_token_id=None,
    )  # fmt: skip
    return stir(transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**config, **more})))


THEIRS = {
    "gpt2": (gpt2, {}),
    "gpt2 untied": (gpt2, dict(tie_word_embeddings=False, n_embd=24, n_head=2, n_layer=3)),
    "gpt2 with its own MLP and eps": (gpt2, dict(n_inner=50, layer_norm_epsilon=1e-3, n_embd=8, n_head=1, n_layer=1)),
    "llama": (llama, {}),
    "llama tied, base 500": (
        llama,
        dict(tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=500.0), hidden_size=48),
    ),
    "llama with biases": (llama, dict(attention_bias=True, mlp_bias=True, rms_norm_eps=1e-3, num_hidden_layers=1)),
}
theirs_of_each_kind = pytest.mark.parametrize(("make", "more"), THEIRS.values(), ids=THEIRS.keys())


def save_ours(folder, tokenizer="bytes", **flags):
    """A run's folder with one checkpoint of a small random model."""
    folder.mkdir(exist_ok=True)
    vocab_size = get_tokenizer(tokenizer).n_vocab if tokenizer else 300
    sizes = dict(block_size=24, vocab_size=vocab_size, n_layer=2, n_head=2, n_embd=16)
    config = GPTConfig(**{**sizes, **flags})
    model = stir(GPT(config))
    state = {"step": 1, "model": model.state_dict(), "gpt_config": vars(config), "tokenizer": tokenizer}
    checkpoint.save(state, folder, keep=0, best_step=None)
    return model


def export(model, out_dir):
    return call("huggingface.py", f"--model={model}", f"--out_dir={out_dir}")


def same_logits(ours, theirs, T=24):
    torch.manual_seed(1)
    idx = torch.randint(min(ours.config.vocab_size, 101), (3, T))
    with torch.no_grad():
        return (ours(idx) - theirs(idx).logits).abs().max() < 1e-5


# ---- in


@theirs_of_each_kind
def test_in_and_out_again(make, more, tmp_path):
    theirs = make(**more)
    theirs.save_pretrained(tmp_path / "in")
    model, tokenizer, path = load_model(str(tmp_path / "in"), CPU)
    assert (tokenizer, path) == (None, tmp_path / "in")
    assert same_logits(model.eval(), theirs)
    done = export(tmp_path / "in", tmp_path / "out")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert "tokenizer is not known" in done.stdout
    before, after = (safetensors.torch.load_file(tmp_path / d / "model.safetensors") for d in ("in", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_parts_prefixes_buffers_and_old_files(tmp_path):
    theirs = gpt2()
    theirs.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) > 2
    state = {name.removeprefix("transformer."): t.contiguous() for name, t in theirs.state_dict().items()}
    state["h.0.attn.bias"] = torch.ones(1, 1, 24, 24).tril().bool()  # as openai-community/gpt2 has it
    state["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    for name in ("old", "bare", "half"):
        (tmp_path / name).mkdir()
        shutil.copy(tmp_path / "parts" / "config.json", tmp_path / name)
    torch.save(state, tmp_path / "old" / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    del state["lm_head.weight"]
    safetensors.torch.save_file(state, tmp_path / "bare" / "model.safetensors")
    for name in ("parts", "old", "bare"):
        assert same_logits(load_model(str(tmp_path / name), CPU)[0].eval(), theirs), name

    half = {name: t.bfloat16() for name, t in state.items()}
    safetensors.torch.save_file(half, tmp_path / "half" / "model.safetensors")
    model = load_model(str(tmp_path / "half"), CPU)[0]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.wte.weight, half["wte.weight"].float())


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, change):
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")


def cut(folder, file, keep):
    (folder / file).write_bytes((folder / file).read_bytes()[:keep])


def index(folder, weights):
    (folder / "model.safetensors").unlink()
    text = json.dumps({"metadata": {}, "weight_map": weights})
    (folder / "model.safetensors.index.json").write_text(text)


def pickled(folder, tensors):
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")


WTE = "transformer.wte.weight"
LLAMA3 = dict(
    rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=16,
)  # fmt: skip
BAD_GPT2 = {
    "model_type = 'bert'": lambda f: edit(f, model_type="bert"),
    "activation_function = 'gelu'": lambda f: edit(f, activation_function="gelu"),
    "scale_attn_by_inverse_layer_idx = True": lambda f: edit(f, scale_attn_by_inverse_layer_idx=True),
    "the logits of our model and of GPT2LMHeadModel differ by": lambda f: edit(f, scale_attn_weights=False),
    "'n_layer' expected int": lambda f: edit(f, n_layer="2"),
    "n_embd = 32 is not a multiple of n_head = 5": lambda f: edit(f, n_head=5),
    "weights differ: missing keys: .*h.2": lambda f: edit(f, n_layer=3),
    "weights differ: unexpected keys: .*h.1": lambda f: edit(f, n_layer=1),
    "weights differ: mismatched keys: .*wpe.weight.*24, 32.*25, 32": lambda f: edit(f, n_positions=25),
    "differ by 5": lambda f: edit_tensors(f, lambda t: t.update({"lm_head.weight": 2 * t[WTE]})),
    "differ by nan": lambda f: edit_tensors(f, lambda t: t[WTE].fill_(torch.nan)),
    "config.json' is not a valid JSON": lambda f: cut(f, "config.json", 50),
    "Should have a `model_type`": lambda f: (f / "config.json").write_text("[]"),
    "RecursionError": lambda f: (f / "config.json").write_text("[" * 100_000),
    "SafetensorError: .*not fully covered": lambda f: cut(f, "model.safetensors", -1),
    "SafetensorError: .*header too small": lambda f: cut(f, "model.safetensors", 0),
    "no file named model.safetensors": lambda f: (f / "model.safetensors").unlink(),
    "No such file .*part-2": lambda f: index(f, {"x": "part-2.safetensors"}),
    "Weights only load failed": lambda f: pickled(f, {"wte.weight": Malicious(f / "evil")}),
    "contains custom code": lambda f: edit(f, model_type="x", auto_map={"AutoConfig": "evil.Config"}),
}
BAD_LLAMA = {
    "num_key_value_heads = 2": lambda f: edit(f, num_key_value_heads=2),
    "hidden_act = 'gelu'": lambda f: edit(f, hidden_act="gelu"),
    "head_dim = 16": lambda f: edit(f, head_dim=16),
    "rope_parameters = .*'llama3'": lambda f: edit(f, rope_parameters=LLAMA3),
    "rope_parameters = .*'linear'": lambda f: edit(
        f, rope_parameters=None, rope_scaling={"type": "linear", "factor": 2.0}
    ),
    "mlp_bias = True": lambda f: edit(f, mlp_bias=True),
    "mlp_bias = False": lambda f: edit(f, attention_bias=True),
    "missing keys: lm_head.weight": lambda f: edit_tensors(f, lambda t: t.pop("lm_head.weight")),
}


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def good_folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    gpt2().save_pretrained(folder / "gpt2")
    llama().save_pretrained(folder / "llama")
    return folder


@pytest.mark.parametrize(
    ("kind", "message"), [("gpt2", m) for m in BAD_GPT2] + [("llama", m) for m in BAD_LLAMA], ids=lambda x: x[:40]
)
def test_a_bad_folder_is_one_line_and_runs_no_code(good_folders, tmp_path, kind, message):
    shutil.copytree(good_folders / kind, tmp_path / "x")
    (BAD_GPT2 | BAD_LLAMA)[message](tmp_path / "x")
    (tmp_path / "x" / "evil.py").write_text(f"import os; os.mkdir({str(tmp_path / 'x' / 'evil')!r})")
    with pytest.raises(UserError, match=message) as error:
        load_model(str(tmp_path / "x"), CPU)
    assert str(error.value).startswith(str(tmp_path / "x"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "x" / "evil").exists()


def test_out_of_memory_is_no_fault_of_the_folder(good_folders, monkeypatch):
    def load(*args, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    done = call("sample.py", f"--model={good_folders / 'gpt2'}", "--device=cpu")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "out of memory" in done.stderr


def test_llama_with_the_buffer_of_old_files(tmp_path):
    theirs = llama()
    theirs.save_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert same_logits(load_model(str(tmp_path), CPU)[0].eval(), theirs)


def test_rope_base_of_old_and_new_configs(tmp_path):
    llama().save_pretrained(tmp_path)
    for changes in (
        dict(rope_parameters=None, rope_theta=700),
        dict(rope_parameters={"rope_type": "default", "rope_theta": 700.0}),
        dict(rope_parameters=None, rope_theta=700.0, rope_scaling={"type": "default"}),
    ):
        edit(tmp_path, **{"rope_theta": None, "rope_scaling": None, **changes})
        assert load_model(str(tmp_path), CPU)[0].config.rope_base == 700.0


def test_names(tmp_path, monkeypatch):
    """gpt2 is downloaded, unless a path of that name holds a model."""
    monkeypatch.chdir(tmp_path)
    gpt2().save_pretrained("hub")
    asked = []

    def snapshot_download(repo, allow_patterns):
        asked.append(repo)
        if repo.endswith("medium"):
            raise ConnectionError("no network")
        return str(tmp_path / "hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    Path("gpt2").mkdir()
    for name in ("gpt2", "gpt2-xl"):
        model, tokenizer, path = load_model(name, CPU)
        assert (tokenizer, path, model.config.vocab_size) == ("gpt2", tmp_path / "hub", 101)
    assert asked == ["openai-community/gpt2", "openai-community/gpt2-xl"]
    with pytest.raises(
        UserError, match="model gpt2-medium cannot be loaded: ConnectionError: no network; without a network, copy"
    ):
        load_model("gpt2-medium", CPU)
    asked.clear()
    save_ours(Path("gpt2"))
    assert load_model("gpt2", CPU)[2] == Path("gpt2/ckpt_000001.pt")
    llama().save_pretrained("gpt2-medium")
    assert load_model("gpt2-medium", CPU)[2] == Path("gpt2-medium")
    assert not asked
    with pytest.raises(UserError, match="did you mean gpt2-large"):
        load_model("gpt2-larg", CPU)


# ---- out

VARIANTS = {
    "gpt2": {},
    "gpt2 untied": dict(tie_weights=False, norm_eps=1e-3),
    "gpt2 no bias": dict(bias=False),
    "gpt2 no qkv bias": dict(qkv_bias=False, mlp_hidden=40),
    "llama": dict(LLAMA, bias=False, tie_weights=False),
    "llama tied": dict(LLAMA, bias=False, rope_base=500.0),
    "llama biases": dict(LLAMA, norm_eps=1e-3),
    "llama qkv bias alone": dict(LLAMA, bias=False, qkv_bias=True),
    "llama no qkv bias": dict(LLAMA, qkv_bias=False),
}


@pytest.mark.parametrize("flags", VARIANTS.values(), ids=VARIANTS.keys())
def test_transformers_loads_what_we_write(flags, tmp_path):
    ours = save_ours(tmp_path / "run", vocab_size=300, dropout=0.1, **flags)
    done = export(tmp_path / "run", tmp_path / "hf" / "mine")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert "300 rows, of which 257" in done.stdout
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf" / "mine", output_loading_info=True)
    assert not any(info.values()), info
    assert type(theirs).__name__ == ("LlamaForCausalLM" if "pos" in flags else "GPT2LMHeadModel")
    assert theirs.dtype == torch.float32
    for config in (theirs.config, theirs.generation_config):
        assert (config.bos_token_id, config.eos_token_id) == (256, 256)
    if "pos" not in flags:
        config = theirs.config
        assert (config.resid_pdrop, config.embd_pdrop, config.attn_pdrop, config.n_ctx) == (0.1, 0.1, 0.1, 24)
    assert same_logits(ours, theirs.eval())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf" / "mine")
    prompt = tokenizer("Once", return_tensors="pt")
    text = theirs.generate(**prompt, max_new_tokens=20, do_sample=False, pad_token_id=0)
    want = torch.stack(list(generate(ours, prompt["input_ids"], 20, temperature=0.0, eot=256)), 1)
    assert torch.equal(text[:, 4:], want[:, : text.size(1) - 4])
    back, tokenizer, _ = load_model(str(tmp_path / "hf" / "mine"), CPU)
    assert same_logits(back.eval(), theirs)
    assert tokenizer == "bytes"
    assert sorted(p.name for p in (tmp_path / "hf").iterdir()) == ["mine"]


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("norm", dict(norm="rmsnorm")),
        ("mlp", dict(mlp="relu2")),
        ("mlp", dict(LLAMA, mlp="relu2")),
        ("norm", dict(pos="rope")),
        ("qk_norm", dict(LLAMA, qk_norm=True)),
        ("qk_norm", dict(qk_norm=True)),
        ("rope_fraction", dict(LLAMA, rope_fraction=0.5)),
        ("attn_scale", dict(attn_scale=0.12)),
        ("embed_norm", dict(embed_norm=True)),
        ("value_embeds", dict(value_embeds=1)),
        ("head_bias", dict(LLAMA, head_bias=True)),
        ("logit_softcap", dict(LLAMA, logit_softcap=15.0)),
    ],
)
def test_no_counterpart(tmp_path, name, flags):
    save_ours(tmp_path / "run", **flags)
    done = export(tmp_path / "run", tmp_path / "hf")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"ckpt_000001.pt: {name} = " in done.stderr
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("flags", [{}, dict(LLAMA, bias=False)], ids=["gpt2", "llama"])
def test_the_whole_context_is_compared(flags):
    model = stir(GPT(GPTConfig(block_size=5000, vocab_size=101, n_layer=2, n_head=2, n_embd=16, **flags)))
    theirs = huggingface.to_transformers(model, None, "the model")
    if flags:
        theirs.model.rotary_emb.inv_freq[-1] *= 1.1  # the longest wavelength, which matters far away
    else:
        theirs.transformer.wpe.weight.data[-1] *= -1
    with pytest.raises(UserError, match=r"the model: the logits of our model and of .* differ by"):
        check_same_logits(model, theirs, "the model")


def test_whole_or_not_at_all(tmp_path):
    save_ours(tmp_path / "run")
    full, file, empty = tmp_path / "full", tmp_path / "file", tmp_path / "empty"
    full.mkdir()
    (full / "note").write_text("mine")
    file.write_text("mine")
    empty.mkdir()
    (tmp_path / ".empty.partial").mkdir()  # what a killed export left
    (tmp_path / ".empty.partial" / "model.safetensors").write_text("half")
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    refused = [export(tmp_path / "run", full), export(tmp_path / "run", file), call("huggingface.py")]
    assert [(done.returncode, done.stderr.count("\n")) for done in refused] == [(2, 1)] * 3
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # as if the disk were full
    try:
        failed = export(tmp_path / "run", empty)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (failed.returncode, failed.stderr.count("\n")) == (2, 1)
    assert "could not be written" in failed.stderr
    assert list(empty.iterdir()) == []
    assert not (tmp_path / ".empty.partial").exists()
    assert export(tmp_path / "run", empty).returncode == 0
    assert len({path.stat().st_mode for path in empty.iterdir()}) == 1
    assert {path.name for path in empty.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


# ---- tokenizers


def own_tokenizer():
    own = tokenizers.ByteLevelBPETokenizer()
    own.train_from_iterator([json.__doc__, random.__doc__] * 2, vocab_size=600, special_tokens=[ENDOFTEXT, "<pad>"])
    return own._tokenizer.to_str()


def add_bytes_tokenizer(folder):
    for name, text in huggingface.tokenizer_files(get_tokenizer("bytes"), 24).items():
        (folder / name).write_text(json.dumps(text), encoding="utf-8")


def random_texts(n):
    rng = random.Random(0)
    parts = ["a", "Be", " the", "the", "'s", "'S", "'ll", "1", "23", "!", "...", "_", ENDOFTEXT, "<|endof", "</s>"]
    parts += ["é", "e\u0301", "中文", "한", "🙂", "👩\u200d👧", "½", "ﬁ", "Ǆ"]
    parts += ["\x00", "\x1f", "\x7f", "\xad", "\u200b", "\ufeff", "\ud7ff", "\U0010ffff"]
    spaces = [" ", "  ", "\n", "\t", "\r\n", "\v", "\f", "\x1c", "\x85", "\u00a0", "\u2003", "\u3000", " " * 20]
    for i in range(n):
        if i % 4 == 0:  # any code points but surrogates
            yield "".join(chr(c) for c in (rng.randrange(0x10F7FF) for _ in range(i % 16)) if not 0xD800 <= c < 0xE000)
        else:
            yield "".join(rng.choices(parts if i % 2 else parts + spaces * 3, k=i % 13))


@pytest.mark.parametrize("name", ["gpt2", "bytes", "own"])
def test_tokenizers_agree(name, tmp_path):
    content = own_tokenizer() if name == "own" else name
    enc = get_tokenizer(content)
    save_ours(tmp_path / "run", content, n_layer=1, **(LLAMA if name == "own" else {}))
    assert export(tmp_path / "run", tmp_path / "hf").returncode == 0
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    texts = list(random_texts(3_000))
    for text, ids in zip(texts, auto(texts)["input_ids"], strict=True):
        assert ids == enc.encode(text, allowed_special={ENDOFTEXT}), repr(text)
    for text, back in zip(texts[:1000], auto.batch_decode(auto(texts[:1000])["input_ids"]), strict=True):
        assert back == text
    assert json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())["clean_up_tokenization_spaces"] is False
    assert (len(auto), auto.bos_token_id, auto.eos_token_id) == (enc.n_vocab, enc.eot_token, enc.eot_token)
    assert auto.decode([enc.eot_token, 65], skip_special_tokens=True) == enc.decode([65])

    again = load_model(str(tmp_path / "hf"), CPU)[1]
    assert same_tokenizer(again, content)
    assert name == "own" or again == name


def test_gpt2s_own_two_tokenizer_files(good_folders, tmp_path):
    shutil.copytree(good_folders / "gpt2", tmp_path, dirs_exist_ok=True)
    data = to_json(get_tokenizer("bytes"))["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(data["vocab"], ensure_ascii=False), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *data["merges"], ""]), encoding="utf-8")
    assert load_model(str(tmp_path), CPU)[1] == "bytes"


def test_a_tokenizer_that_splits_otherwise_or_is_damaged_is_unknown(good_folders, tmp_path, capsys):
    shutil.copytree(good_folders / "llama", tmp_path, dirs_exist_ok=True)
    words = to_json(get_tokenizer("bytes")) | {"pre_tokenizer": {"type": "Whitespace"}}
    for text in (json.dumps(words), "{}", "[" * 100_000, "{"):
        (tmp_path / "tokenizer.json").write_text(text)
        assert load_model(str(tmp_path), CPU)[1] is None
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert f"{tmp_path}: its tokenizer counts as unknown" in err


# ---- used by the other scripts


@theirs_of_each_kind
def test_training_starts_from_a_folder(make, more, tmp_path):
    theirs = make(**more, **{"n_positions" if make is gpt2 else "max_position_embeddings": 32})
    theirs.save_pretrained(tmp_path / "hf")
    rng = np.random.default_rng(0)
    tokens = rng.integers(101, size=2000)
    (tmp_path / "data").mkdir()
    write_shard(tmp_path / "data" / "x_val_000000.bin", tokens[:500])
    write_shard(tmp_path / "data" / "x_train_000001.bin", tokens)
    flags = [flag for flag in TRAIN if flag not in MODEL and "interval" not in flag]
    done = call(
        "train_gpt2.py", *flags, f"--init_from={tmp_path / 'hf'}", f"--data_dir={tmp_path / 'data'}",
        f"--out_dir={tmp_path / 'run'}", "--max_steps=1", "--vocab_size=128", "--block_size=16", "--dropout=0.1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    x, y = (torch.tensor(tokens[i : i + 31 * 16]).view(31, 16) for i in (0, 1))
    with torch.no_grad():
        logits = theirs(x).logits
    # The 27 new ids have the mean embedding, or a head row of the mean: their logits are the mean of the others'.
    logits = torch.cat([logits, logits.mean(-1, keepdim=True).expand(-1, -1, 27)], -1)
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten()).item()
    assert metrics(tmp_path / "run", "val")[0]["val_loss"] == pytest.approx(want, abs=1e-5)
    run = metrics(tmp_path / "run", "run")[0]["gpt_config"]
    assert (run["dropout"], run["block_size"], run["vocab_size"]) == (0.1, 16, 128)
    refused = call(
        "train_gpt2.py", *flags, f"--init_from={tmp_path / 'hf'}", f"--data_dir={tmp_path / 'data'}",
        f"--out_dir={tmp_path / 'other'}", "--n_layer=7",
    )  # fmt: skip
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "n_layer = 7" in refused.stderr


def test_sample_from_a_folder(tmp_path):
    save_ours(tmp_path / "run")
    assert export(tmp_path / "run", tmp_path / "hf").returncode == 0
    texts = [
        call("sample.py", f"--model={tmp_path / name}", "--device=cpu", "--start=The", "--max_new_tokens=20").stdout
        for name in ("run", "hf")
    ]
    assert texts[0] == texts[1]
    assert len(texts[0]) > 20


def test_any_model_can_be_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no checkpoint under out/"):
        load_model(None, CPU)
    for run in ("a", "b"):
        (tmp_path / "out").mkdir(exist_ok=True)
        model = save_ours(tmp_path / "out" / run)
    path = Path("out/b/ckpt_000001.pt")
    for name in (None, "out/b", str(path)):
        loaded, tokenizer, found = load_model(name, CPU)
        assert (tokenizer, found) == ("bytes", path)
        assert loaded.lm_head.weight is loaded.wte.weight
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "half.pt").write_bytes(b"half")
    for name in ("nowhere", "empty", "empty/half.pt"):
        with pytest.raises(UserError, match=name):
            load_model(name, CPU)


def test_starting_weights_cropped_and_padded(tmp_path):
    model = save_ours(tmp_path / "run", tie_weights=False)
    path, config, old = str(tmp_path / "run"), model.config, model.state_dict()
    asked = GPTConfig(**{**vars(config), "block_size": 4, "dropout": 0.5, "n_layer": 9})
    meta = {"vocab_size": 300, "tokenizer": "bytes"}
    new, weights = starting_weights(path, asked, {"block_size", "dropout"}, "data", meta)
    assert new == GPTConfig(**{**vars(config), "block_size": 4, "dropout": 0.5, "vocab_size": 300})
    GPT(new).load_state_dict(weights)
    assert torch.equal(weights["wpe.weight"], old["wpe.weight"][:4])
    for name in ("wte.weight", "lm_head.weight"):
        assert torch.equal(weights[name][:257], old[name])
        assert torch.allclose(weights[name][257:], old[name].mean(0).expand(43, -1))
    for given in ({"n_layer"}, {"block_size"}):
        larger = GPTConfig(**{**vars(asked), "block_size": 32})
        with pytest.raises(UserError, match=next(iter(given))):
            starting_weights(path, larger, given, "data", meta | {"vocab_size": 257})


def test_weights_and_data_of_different_tokenizers_do_not_go_together(data_dir, tmp_path):
    """Neither where it is another tokenizer, nor is one that was exported taken for another; unknown passes."""
    refused = {
        "gpt2": "trained with gpt2, but .* was made with bytes",
        own_tokenizer(): "trained with a tokenizer.json, but .* was made with bytes",
    }
    for number, (tokenizer, message) in enumerate(refused.items()):
        save_ours(tmp_path / f"{number}", tokenizer)
        done = start(tmp_path / f"{number}", data_dir, tmp_path / "x")
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert re.search(message, done.stderr)
        assert not (tmp_path / "x").exists()
    for name in ("bytes", None):
        save_ours(tmp_path / str(name), name)
        done = start(tmp_path / str(name), data_dir, tmp_path / f"from_{name}")
        assert done.returncode == 0, done.stderr


def start(source, data_dir, out_dir):
    flags = [flag for flag in TRAIN if flag not in MODEL and "interval" not in flag]
    return call(
        "train_gpt2.py", *flags, f"--init_from={source}", f"--data_dir={data_dir}", f"--out_dir={out_dir}",
        "--max_steps=1", "--val_interval=0", "--total_batch_size=48",
    )  # fmt: skip


def test_an_exported_tokenizer_is_still_the_same(data_dir, tmp_path):
    content = own_tokenizer()
    save_ours(tmp_path / "run", content, n_layer=1)
    assert export(tmp_path / "run", tmp_path / "hf").returncode == 0
    assert load_model(str(tmp_path / "hf"), CPU)[1] != content  # it is spelled otherwise
    for path in data_dir.glob("*.bin"):
        shutil.copy(path, tmp_path / "run" / path.name)
    meta = json.loads((data_dir / "meta.json").read_text()) | {"tokenizer": "tokenizer.json", "vocab_size": 600}
    (tmp_path / "run" / "meta.json").write_text(json.dumps(meta))
    (tmp_path / "run" / "tokenizer.json").write_text(content, encoding="utf-8")
    done = start(tmp_path / "hf", tmp_path / "run", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    done = call("evaluate.py", f"--model={tmp_path / 'hf'}", f"--data_dir={tmp_path / 'run'}", "--device=cpu")
    assert done.returncode == 0, done.stderr


def test_a_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_ours(tmp_path / "run")
    assert export("~/run", "~/hf").returncode == 0
    assert (tmp_path / "hf" / "config.json").exists()
