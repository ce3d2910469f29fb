"""Models and tokenizers to and from Hugging Face; the oracle is transformers itself."""

import contextlib
import dataclasses
import errno
import json
import os
import random
import runpy
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import tokenizers
import torch
import transformers
from conftest import ROOT, call
from test_sample import save
from test_tokenizer import random_texts

import huggingface
from configurator import UserError
from huggingface import load_model, starting_weights
from model import GPT, GPTConfig
from sample import generate
from tokenizer import ENDOFTEXT, get_tokenizer, same_tokenizer, to_json

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
CPU = torch.device("cpu")
LLAMA = dict(pos="rope", norm="rmsnorm", mlp="swiglu")
SMALL = dict(block_size=24, vocab_size=300, n_layer=2, n_head=2, n_embd=16)


def stir(model):
    """Biases and norm gains away from 0 and 1, and weights large, so that all of them are tested."""
    torch.manual_seed(0)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model.eval()


def gpt2(**more):
    sizes = dict(vocab_size=101, n_positions=24, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    return stir(transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**sizes, **more})))


def llama(**more):
    sizes = dict(vocab_size=101, max_position_embeddings=24, hidden_size=32, num_hidden_layers=2, intermediate_size=64)
    sizes |= dict(num_attention_heads=4, pad_token_id=None)
    return stir(transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **more})))


def ours(**flags):
    return stir(GPT(GPTConfig(**{**SMALL, **flags})))


def export(model, out_dir):
    return call("huggingface.py", f"--model={model}", f"--out_dir={out_dir}")


def same_logits(ours, theirs):
    idx = torch.randint(101, (3, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return (ours.eval()(idx) - theirs(idx).logits).abs().max() < 1e-5


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, change):
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")


# ---- in


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    gpt2().save_pretrained(folder / "gpt2")
    llama().save_pretrained(folder / "llama")
    return folder


@pytest.mark.parametrize(
    ("make", "more"),
    [
        (gpt2, dict(tie_word_embeddings=False, n_inner=50, layer_norm_epsilon=1e-3, n_head=1, n_layer=1)),
        (llama, dict(attention_bias=True, mlp_bias=True, rms_norm_eps=1e-3, num_hidden_layers=1)),
        (llama, dict(tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=500.0))),
    ],
    ids=["gpt2 untied", "llama biases", "llama tied"],
)
def test_in_and_out_again(make, more, tmp_path):
    theirs = make(**more)
    theirs.save_pretrained(tmp_path / "in")
    model, tokenizer, path = load_model(str(tmp_path / "in"), CPU)
    assert (tokenizer, path) == (None, tmp_path / "in")
    assert same_logits(model, theirs)
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
        assert same_logits(load_model(str(tmp_path / name), CPU)[0], theirs), name
    half = {name: t.bfloat16() for name, t in state.items()}
    safetensors.torch.save_file(half, tmp_path / "half" / "model.safetensors")
    model = load_model(str(tmp_path / "half"), CPU)[0]
    assert torch.equal(model.wte.weight, half["wte.weight"].float())


BAD = {
    "activation_function = 'gelu'": lambda f: edit(f, activation_function="gelu"),
    "the logits of our model and of GPT2LMHeadModel differ by": lambda f: edit(f, scale_attn_weights=False),
    "weights differ: missing keys: .*h.2": lambda f: edit(f, n_layer=3),
    "weights differ: unexpected keys: .*h.1": lambda f: edit(f, n_layer=1),
    "weights differ: mismatched keys: .*wpe.weight.*24, 32.*25, 32": lambda f: edit(f, n_positions=25),
    "differ by nan": lambda f: edit_tensors(f, lambda t: t["transformer.wte.weight"].fill_(torch.nan)),
    "config.json: not JSON": lambda f: (f / "config.json").write_text('{"model_type": "gpt2",'),
    "cannot be read: SafetensorError": lambda f: os.truncate(f / "model.safetensors", 999),
    "model_type = 'x'": lambda f: edit(f, model_type="x", auto_map={"AutoConfig": "evil.Config"}),
    "num_key_value_heads = 2": lambda f: edit(f, num_key_value_heads=2),
    "rope_parameters = .*'linear'": lambda f: edit(f, rope_parameters=None, rope_scaling=dict(type="linear", factor=2)),
    "mlp_bias = False": lambda f: edit(f, attention_bias=True),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD, ids=lambda x: x[:40])
def test_a_bad_folder_is_one_line_and_runs_no_code(good, tmp_path, message):
    kind = "llama" if message.startswith(("num_key", "rope", "mlp")) else "gpt2"
    shutil.copytree(good / kind, tmp_path / "x")
    BAD[message](tmp_path / "x")
    (tmp_path / "x" / "evil.py").write_text(f"import os; os.mkdir({str(tmp_path / 'x' / 'evil')!r})")
    with pytest.raises(UserError, match=message) as error:
        load_model(str(tmp_path / "x"), CPU)
    assert str(error.value).startswith(str(tmp_path / "x"))
    assert not (tmp_path / "x" / "evil").exists()


def test_a_folder_that_cannot_be_read_is_one_line():
    with tempfile.TemporaryDirectory() as private, contextlib.ExitStack() as after:
        Path(private, "hf").mkdir()
        os.chmod(private, 0)
        after.callback(os.chmod, private, 0o700)
        if os.geteuid() == 0:
            os.seteuid(65534)
            after.callback(os.seteuid, 0)
        for name in (private, f"{private}/hf"):
            with pytest.raises(UserError, match=f"{name} cannot be read: Permission denied"):
                load_model(name, CPU)


def test_rope_base_of_old_and_new_configs(good, tmp_path):
    shutil.copytree(good / "llama", tmp_path, dirs_exist_ok=True)
    edit_tensors(tmp_path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    new = dict(rope_type="default", rope_theta=700.0)
    for changes in (dict(rope_parameters=None, rope_theta=700), dict(rope_parameters=new, rope_theta=None)):
        edit(tmp_path, **changes)
        assert load_model(str(tmp_path), CPU)[0].config.rope_base == 700.0


def test_names(good, tmp_path, monkeypatch):
    """gpt2 is downloaded, unless a path of that name holds a model."""
    monkeypatch.chdir(tmp_path)
    asked = []

    def snapshot_download(repo, allow_patterns):
        asked.append(repo)
        if repo.endswith("medium"):
            raise ConnectionError("no network")
        return str(good / "gpt2")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    Path("gpt2").mkdir()
    for name in ("gpt2", "gpt2-xl"):
        assert load_model(name, CPU)[1:] == ("gpt2", good / "gpt2")
    assert asked == ["openai-community/gpt2", "openai-community/gpt2-xl"]
    with pytest.raises(UserError, match=r"model gpt2-medium .*ConnectionError: no network; without a network, name"):
        load_model("gpt2-medium", CPU)
    asked.clear()
    save(Path("gpt2"), ours())
    assert load_model("gpt2", CPU)[2] == Path("gpt2/ckpt_000001.pt")
    shutil.copytree(good / "llama", "gpt2-medium")
    assert load_model("gpt2-medium", CPU)[2] == Path("gpt2-medium")
    assert not asked
    Path("empty").mkdir()
    Path("half.pt").write_bytes(b"half")
    for name in ("nowhere", "empty", "half.pt", "gpt2-larg.*; did you mean gpt2-large"):
        with pytest.raises(UserError, match=name):
            load_model(name.partition(".*")[0], CPU)
    with pytest.raises(UserError, match="--best=True is for a run"):
        load_model("gpt2-medium", CPU, best=True)


def test_the_newest_run(tmp_path, monkeypatch):
    """Behind a link too; a checkpoint that is pruned meanwhile, or a link to nowhere, is not one."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no checkpoint under out/"):
        load_model(None, CPU)
    for age, folder in ((30, "out/a/b"), (20, "elsewhere"), (10, "out/c")):
        Path(folder).mkdir(parents=True)
        path = save(folder, model := ours())
        os.utime(path, (path.stat().st_mtime - age,) * 2)
    Path("out/c/ckpt_000001.pt").rename("out/c/ckpt_final.pt")  # no checkpoint's name
    Path("out/c/ckpt_000002.pt").symlink_to("gone.pt")
    Path("out/linked").symlink_to(tmp_path / "elsewhere")
    loaded, tokenizer, found = load_model(None, CPU)
    assert (tokenizer, found) == ("bytes", Path("out/linked/ckpt_000001.pt"))
    assert loaded.lm_head.weight is loaded.wte.weight
    assert same_weights(loaded, model)


# ---- out

NATIVE = {
    "gpt2 no bias": dict(bias=False, dropout=0.1),
    "gpt2 untied, no qkv bias": dict(qkv_bias=False, mlp_hidden=40, tie_weights=False, norm_eps=1e-3),
    "llama": dict(LLAMA, bias=False, tie_weights=False),
    "llama tied, base 500": dict(LLAMA, bias=False, rope_base=500.0),
    "llama qkv bias alone": dict(LLAMA, bias=False, qkv_bias=True, norm_eps=1e-3),
    "llama no qkv bias": dict(LLAMA, qkv_bias=False),
}
EVERYTHING = dict(
    rope_fraction=0.5, qk_norm=True, attn_scale=0.12, embed_norm=True, value_embeds=2, head_bias=True,
    logit_softcap=15.0, tie_weights=False, init="zero",
)  # fmt: skip
REMOTE = {
    "rmsnorm": dict(norm="rmsnorm", dropout=0.1),
    "relu2": dict(mlp="relu2", bias=False),
    "qk_norm": dict(LLAMA, qk_norm=True),
    "everything": dict(LLAMA, mlp="relu2", n_layer=3, **EVERYTHING),
    "all without rope": dict(EVERYTHING, rope_fraction=1.0),
}


@pytest.mark.parametrize("flags", [*NATIVE.values(), *REMOTE.values()], ids=[*NATIVE, *REMOTE])
def test_transformers_loads_what_we_write(flags, tmp_path):
    model, out, native = ours(**flags), tmp_path / "hf" / "mine", flags in NATIVE.values()
    save(tmp_path, model)
    done = export(tmp_path, out)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert "300 rows, of which 257" in done.stdout
    assert ("trust_remote_code=True" in done.stdout) == (not native)
    how = dict(trust_remote_code=True, output_loading_info=True)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(out, **how)
    assert not any(info.values()), info
    kinds = ("LlamaForCausalLM" if "pos" in flags else "GPT2LMHeadModel") if native else "TrainGPT2"
    assert (type(theirs).__name__, theirs.dtype, theirs.training) == (kinds, torch.float32, False)
    for config in (theirs.config, theirs.generation_config):
        assert (config.bos_token_id, config.eos_token_id) == (256, 256)
    assert theirs.config.tie_word_embeddings == model.config.tie_weights
    if kinds == "GPT2LMHeadModel":
        config = theirs.config
        assert {config.resid_pdrop, config.embd_pdrop, config.attn_pdrop} == {flags.get("dropout", 0.0)}
    assert same_logits(model, theirs)

    # Greedy text is the same, from its own tokenizer, alone and in a batch that is padded on the left.
    tokenizer = transformers.AutoTokenizer.from_pretrained(out, trust_remote_code=True, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    prompts = ["Once", "Upon a ti", "x"]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    made = theirs.generate(**batch, max_new_tokens=15, do_sample=False, use_cache=True)[:, 9:]
    for row, prompt in zip(made, prompts, strict=True):
        want = torch.cat(list(generate(model, torch.tensor([[*prompt.encode()]]), 15, 0.0, eot=256)))
        assert row.tolist()[: len(want)] == want.tolist()

    # It comes back, also after transformers wrote it again.
    theirs.save_pretrained(tmp_path / "again")
    for folder, known in ((out, "bytes"), (tmp_path / "again", None)):
        back, tokenizer, _ = load_model(str(folder), CPU)
        assert tokenizer == known
        assert same_logits(back, theirs)
        assert native or (back.config == model.config and same_weights(back, model))


def test_a_remote_model_can_be_trained_and_continues_beyond_its_context(tmp_path):
    model, idx = ours(mlp="relu2"), torch.randint(257, (2, 24))
    huggingface.save_folder(model, None, tmp_path / "hf", "a test")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    labels = idx.masked_fill(idx < 30, -100)
    want = model(idx[:, :-1], labels[:, 1:].masked_fill(labels[:, 1:] < 0, -1))
    loss = theirs(idx, labels=labels).loss
    assert torch.allclose(loss, want, atol=1e-6)
    loss.backward()
    assert theirs.gpt.wte.weight.grad.abs().sum() > 0
    assert theirs.generate(idx, max_new_tokens=9, do_sample=False, pad_token_id=0, eos_token_id=[299]).size(1) == 33
    theirs.bfloat16().save_pretrained(tmp_path / "half")
    back = load_model(str(tmp_path / "half"), CPU)[0]
    assert torch.equal(back.wte.weight, model.wte.weight.bfloat16().float())


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.py")), ids=lambda path: path.stem)
def test_every_recipe_can_be_exported_and_comes_back(path, tmp_path):
    recipe = {name: value for name, value in runpy.run_path(path).items() if name in vars(GPTConfig())}
    recipe |= dict(n_layer=4, n_embd=24, n_head=2, block_size=24, vocab_size=128)
    cases = [(GPTConfig(**recipe), path.name.startswith(("finetune", "gpt2_", "shakespeare_124m")))]
    if "with --mlp=swiglu --qk_norm=False it is a Llama" in path.read_text():
        cases.append((GPTConfig(**recipe | dict(mlp="swiglu", qk_norm=False)), True))
    assert len(cases) == 1 + (path.stem in ("small", "shakespeare_gpu", "tinystories"))
    for config, native in cases:
        model, out = stir(GPT(config)), tmp_path / f"native_{native}"
        huggingface.save_folder(model, None, out, path)
        assert (out / "model.py").exists() == (not native)
        assert same_logits(model, transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True))
        back = load_model(str(out), CPU)[0]
        assert same_logits(back, lambda idx: SimpleNamespace(logits=model(idx)))  # noqa: B023
        assert native or (back.config == config and same_weights(back, model))


@pytest.mark.parametrize("flags", [{}, dict(LLAMA, bias=False)], ids=["gpt2", "llama"])
def test_the_whole_context_is_compared(flags):
    model = ours(block_size=5000, **flags)
    theirs = huggingface.to_transformers(model, None, "the model")
    if flags:
        theirs.model.rotary_emb.inv_freq[-1] *= 1.1  # the longest wavelength, which matters far away
    else:
        theirs.transformer.wpe.weight.data[-1] *= -1
    with pytest.raises(UserError, match=r"the model: the logits of our model and of .* differ by"):
        huggingface.check_same_logits(model, theirs, "the model")


def test_whole_or_not_at_all(tmp_path, monkeypatch):
    run, full, file, empty = (tmp_path / name for name in ("run", "full", "file", "empty"))
    for folder in (run, full, empty):
        folder.mkdir()
    save(run, ours())
    (full / "note").write_text("mine")
    file.write_text("mine")
    (empty / ".huggingface.partial").mkdir()  # what a killed export left
    (empty / ".huggingface.partial" / "model.safetensors").write_text("half")
    refused = [export(run, full), export(run, file), call("huggingface.py")]
    assert [(done.returncode, done.stderr.count("\n")) for done in refused] == [(2, 1)] * 3
    assert (os.listdir(full), file.read_text()) == (["note"], "mine")

    def full_disk(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        failed = export(run, empty)
    assert (failed.returncode, failed.stderr.count("\n")) == (2, 1)
    assert f"{empty} cannot be written: OSError: [Errno 28] No space left" in failed.stderr
    assert os.listdir(empty) == []

    # A mount point: nothing replaces it, and nothing can be written beside it. Its file system may have no chmod.
    replace = os.replace

    def within_the_mount(source, target):
        if not (Path(source).is_relative_to(empty) and Path(target).parent == empty):
            raise OSError(errno.EBUSY, "Device or resource busy")
        moved.append(Path(target).name)
        replace(source, target)

    def chmod(*args, **kwargs):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    moved = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", within_the_mount)
        patch.setattr(Path, "chmod", chmod)
        assert export(run, empty).returncode == 0
    files = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(os.listdir(empty)) == sorted(moved) == files
    assert moved[-1] == "config.json"  # without it the folder is no model
    assert export(run, tmp_path / "new").returncode == 0
    assert len({path.stat().st_mode for path in (tmp_path / "new").iterdir()}) == 1


# ---- tokenizers


def own_tokenizer():
    """With a document token of its own name, and an added token that takes the space before it."""
    own = tokenizers.ByteLevelBPETokenizer()
    own.train_from_iterator([json.__doc__, random.__doc__] * 2, vocab_size=600, special_tokens=["<pad>", "</s>"])
    own.add_special_tokens([tokenizers.AddedToken("<tool>", lstrip=True, special=True)])
    return own._tokenizer.to_str()


@pytest.mark.parametrize("name", ["gpt2", "bytes", "own"])
def test_tokenizers_agree(name, tmp_path):
    content = own_tokenizer() if name == "own" else name
    enc = get_tokenizer(content)
    save(tmp_path, ours(n_layer=1, vocab_size=enc.n_vocab, **(LLAMA if name == "own" else {})), content)
    assert export(tmp_path, tmp_path / "hf").returncode == 0
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    own_name = "</s>" if name == "own" else ENDOFTEXT
    texts = [text.replace(ENDOFTEXT, own_name) for text in random_texts(0, 1_500)]
    for text, ids in zip(texts, auto(texts)["input_ids"], strict=True):
        assert ids == enc.encode(text.replace(own_name, ENDOFTEXT), allowed_special={ENDOFTEXT}), repr(text)
    assert auto.batch_decode(auto(texts)["input_ids"], clean_up_tokenization_spaces=None) == texts
    assert (len(auto), auto.bos_token_id, auto.eos_token_id) == (enc.n_vocab, enc.eot_token, enc.eot_token)
    assert (auto.bos_token, auto.eos_token, auto.unk_token) == (own_name,) * 3
    assert auto.decode([enc.eot_token, 65], skip_special_tokens=True) == enc.decode([65])
    again = load_model(str(tmp_path / "hf"), CPU)[1]
    assert same_tokenizer(again, content)
    assert again == content
    if name == "own":  # the flags of added tokens are as they came
        added = [json.loads(text)["added_tokens"] for text in (content, auto.backend_tokenizer.to_str())]
        assert added[0] == added[1]


def test_gpt2s_own_two_files_and_tokenizers_that_are_not_ours(good, tmp_path, capsys):
    shutil.copytree(good / "llama", tmp_path, dirs_exist_ok=True)
    spec = json.loads(to_json("bytes"))
    (tmp_path / "vocab.json").write_text(json.dumps(spec["model"]["vocab"], ensure_ascii=False), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    assert load_model(str(tmp_path), CPU)[1] == "bytes"
    for text in (json.dumps(spec | {"pre_tokenizer": {"type": "Whitespace"}}), "{}", "{"):
        (tmp_path / "tokenizer.json").write_text(text)
        assert load_model(str(tmp_path), CPU)[1] is None
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert f"{tmp_path}: its tokenizer counts as unknown" in err


# ---- used by the other scripts


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_starting_weights_are_cropped_and_padded(good, kind):
    """The 27 new rows are the mean of the others, so the new ids' logits are the mean of transformers' logits."""
    load = dict(gpt2=transformers.GPT2LMHeadModel, llama=transformers.LlamaForCausalLM)[kind]
    theirs, idx = load.from_pretrained(good / kind), torch.randint(101, (3, 16))
    old = load_model(str(good / kind), CPU)[0].config
    asked = dataclasses.replace(old, block_size=16, dropout=0.5, n_layer=9)
    for given, meta in (({"vocab_size"}, {}), (set(), dict(vocab_size=128, tokenizer="bytes"))):
        wanted = dataclasses.replace(asked, vocab_size=128 if given else 7)
        new, weights = starting_weights(str(good / kind), wanted, given | {"block_size", "dropout"}, "data", meta)
        assert new == dataclasses.replace(old, block_size=16, dropout=0.5, vocab_size=128)
        (model := GPT(new).eval()).load_state_dict(weights)
        with torch.no_grad():
            want = theirs(idx).logits
            want = torch.cat([want, want.mean(-1, keepdim=True).expand(-1, -1, 27)], -1)
            assert (model(idx) - want).abs().max() < 1e-5


def test_starting_weights_that_do_not_fit(tmp_path):
    save(tmp_path, model := ours(value_embeds=1))
    asked = dataclasses.replace(model.config, block_size=32, vocab_size=299, n_layer=9)
    for name in ("n_layer", "block_size", "vocab_size"):
        with pytest.raises(UserError, match=f"{name} = .*{tmp_path}.* has"):
            starting_weights(str(tmp_path), asked, {name}, "data", {"vocab_size": 257, "tokenizer": "bytes"})
    with pytest.raises(UserError, match=r"bytes.* gpt2"):
        starting_weights(str(tmp_path), asked, set(), "data", {"vocab_size": 50257, "tokenizer": "gpt2"})
    meta = {"vocab_size": 320, "tokenizer": "bytes"}
    assert starting_weights(str(tmp_path), asked, set(), "data", meta)[1]["vte.0.weight"].shape == (320, 16)
