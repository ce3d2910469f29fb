"""The model against transformers, against itself computed another way, and against known numbers."""

import re

import pytest
import torch
import transformers
from torch.nn import functional as F

import model
from model import GPT, GPTConfig, KVCache, causal_attention, one_product

TINY = dict(block_size=32, vocab_size=101, n_layer=3, n_head=4, n_embd=32)
MODERN = dict(pos="rope", norm="rmsnorm", mlp="swiglu")
VARIANTS = {
    "gpt2": {},
    "qkv bias alone off, untied": dict(qkv_bias=False, tie_weights=False),
    "modern": MODERN,
    "speed run": dict(
        pos="rope", norm="rmsnorm", mlp="relu2", qk_norm=True, rope_fraction=0.5, attn_scale=0.12, embed_norm=True,
        value_embeds=2, tie_weights=False, head_bias=True, logit_softcap=15.0,
    ),
}  # fmt: skip
variants = pytest.mark.parametrize("flags", VARIANTS.values(), ids=VARIANTS.keys())


def make(flags=None, **more):
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(**{**TINY, **(flags or {}), **more}))
    for p in gpt.parameters():  # gains and biases away from 1 and 0; matrices so large that activations bend
        p.data = p.data + 0.1 * torch.randn_like(p) if p.dim() == 1 else 5 * p.data
    return gpt.eval()


def batch(B=3, T=32):
    torch.manual_seed(1)
    tokens = torch.randint(TINY["vocab_size"], (B, T + 1))
    return tokens[:, :-1], tokens[:, 1:].clone()


SIZES = [
    (124_439_808, 12, 12, 768),
    (354_823_168, 24, 16, 1024),
    (774_030_080, 36, 20, 1280),
    (1_557_611_200, 48, 25, 1600),
]


@pytest.mark.parametrize(("count", "n_layer", "n_head", "n_embd"), SIZES)
def test_parameters_and_flops_of_gpt2(count, n_layer, n_head, n_embd):
    with torch.device("meta"):
        gpt = GPT(GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd))
    assert gpt.num_params() == count
    assert gpt.flops_per_token(1024) == 6 * (count - 1024 * n_embd) + 12 * n_layer * n_embd * 1024


def as_gpt2(ours):
    """Tensors by our names -> by transformers' names. Its Conv1D holds matrices transposed, and q, k, v as one."""
    theirs = {}
    for name, x in ours.items():
        name = name if name.startswith("lm_head") else f"transformer.{name}"
        x = x.T if re.search(r"c_(q|k|v|proj|fc)\.weight", name) else x
        theirs.setdefault(re.sub(r"c_[qkv]\.", "c_attn.", name), []).append(x)
    return {name: torch.cat(parts, dim=-1) for name, parts in theirs.items()}


def as_llama(ours):
    names = dict(
        wte="embed_tokens", ln_f="norm", h="layers", ln_1="input_layernorm", ln_2="post_attention_layernorm",
        attn="self_attn", c_q="q_proj", c_k="k_proj", c_v="v_proj", c_gate="gate_proj", c_fc="up_proj",
    )  # fmt: skip
    theirs = {}
    for name, x in ours.items():
        name = name.replace("attn.c_proj", "attn.o_proj").replace("mlp.c_proj", "mlp.down_proj")
        name = ".".join(names.get(part, part) for part in name.split("."))
        theirs[name if name.startswith("lm_head") else f"model.{name}"] = x
    return theirs


def compare(ours, theirs, rename):
    """Logits, loss and every gradient against a transformers model with the same weights."""
    result = theirs.load_state_dict(rename(ours.state_dict()), strict=False)
    assert not result.unexpected_keys
    idx, targets = batch()
    loss, logits = ours(idx, targets), theirs(idx).logits
    want = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    want.backward()
    torch.testing.assert_close(ours(idx), logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, want)
    grads = {name: p.grad for name, p in theirs.named_parameters()}
    for name, grad in rename({name: p.grad for name, p in ours.named_parameters()}).items():
        torch.testing.assert_close(grad, grads.pop(name), rtol=1e-4, atol=1e-5)
    assert not grads


@pytest.mark.parametrize("tie", [True, False])
def test_equals_transformers_gpt2(tie):
    config = transformers.GPT2Config(
        vocab_size=101, n_positions=32, n_embd=32, n_layer=3, n_head=4, tie_word_embeddings=tie
    )
    compare(make(tie_weights=tie), transformers.GPT2LMHeadModel(config).eval(), as_gpt2)


@pytest.mark.parametrize("base", [10000.0, 500.0])
def test_equals_transformers_llama(base):
    config = transformers.LlamaConfig(
        vocab_size=101, hidden_size=32, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=32, rms_norm_eps=1e-5, tie_word_embeddings=False,
        rope_parameters=dict(rope_type="default", rope_theta=base),
    )  # fmt: skip
    ours = make(MODERN, bias=False, tie_weights=False, rope_base=base)
    compare(ours, transformers.LlamaForCausalLM(config).eval(), as_llama)


def test_initial_weights_of_gpt2():
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(n_layer=12, n_embd=192, n_head=6, vocab_size=512))
    for name, p in gpt.named_parameters():
        if p.dim() == 2:
            assert p.std().item() == pytest.approx(0.0041 if "c_proj" in name else 0.02, rel=0.02), name
        else:
            assert (p == ("ln" in name and "weight" in name)).all(), name


def test_targets_of_minus_one_do_not_count():
    gpt, (idx, targets) = make(), batch()
    targets[:, ::3] = -1
    keep = targets >= 0
    brute = -gpt(idx).log_softmax(-1)[keep].gather(1, targets[keep][:, None]).mean()
    torch.testing.assert_close(gpt(idx, targets), brute)


def test_dropout_is_in_each_of_its_places_and_only_in_training():
    """Behind the embedding, in the attention weights, behind both projections: each alone changes the output."""
    gpt, dropped, (idx, _) = make().train(), make(dropout=0.5), batch()
    exact = gpt(idx)
    assert torch.equal(dropped(idx), exact)  # it is not in training
    places = {"drop": "p", "h.1.attn": "dropout", "h.1.attn.resid_drop": "p", "h.1.mlp.drop": "p"}
    for name, attribute in places.items():
        place = gpt.get_submodule(name)
        assert getattr(dropped.get_submodule(name), attribute) == 0.5
        setattr(place, attribute, 0.5)
        assert not torch.equal(gpt(idx), exact)
        setattr(place, attribute, 0.0)
    assert torch.equal(gpt(idx), exact)


@variants
def test_cached_logits_equal_uncached(flags):
    """Whatever the pieces in which a sequence arrives: one by one, several behind a past, all at once."""
    gpt, (idx, _) = make(flags), batch()
    with torch.no_grad():
        whole = gpt(idx)
        for pieces in ([1] * 32, [5, 1, 10, 16], [32]):
            cache = KVCache(gpt.config, 3, 32)
            parts = [gpt(part, cache=cache) for part in idx.split(pieces, dim=1)]
            torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


WRONG = [
    dict(n_head=5), dict(dropout=1.0), dict(n_layer=0), dict(pos="rope", n_head=32), dict(mlp_hidden=0),
    dict(rope_base=-1.0), dict(rope_fraction=0.0), dict(rope_fraction=1.1), dict(attn_scale=0.0),
    dict(logit_softcap=0), dict(value_embeds=4), dict(init="zero"),
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_impossible_configs(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        GPTConfig(**{**TINY, **wrong})


@pytest.mark.parametrize("scale", [None, 0.12])
def test_causal_attention_in_bfloat16_is_as_exact_as_torchs(scale):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 64, 32) for _ in range(3))
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    torch.testing.assert_close(causal_attention(q, k, v, scale), want, rtol=1e-5, atol=1e-5)
    low = [x.bfloat16() for x in (q, k, v)]
    torchs = (F.scaled_dot_product_attention(*low, is_causal=True, scale=scale).float() - want).abs().max()
    assert (causal_attention(*low, scale).float() - want).abs().max() < 2 * torchs


@pytest.mark.parametrize("bias", [True, False])
def test_one_product_equals_three(bias):
    torch.manual_seed(0)
    x, projections = torch.randn(3, 5, 32), [torch.nn.Linear(32, 8, bias=bias) for _ in range(3)]
    torch.testing.assert_close(one_product(projections, x), tuple(proj(x) for proj in projections))


@variants
@pytest.mark.parametrize(("device", "dtype"), [("cuda", "bfloat16"), ("cuda", "float16"), ("cpu", "bfloat16")])
def test_dtype_of_the_residual_stream(monkeypatch, flags, device, dtype):
    """bfloat16 under autocast on a GPU only. Here a CPU says that its autocast is a GPU's."""
    gpt, (idx, targets) = make(flags), batch()
    exact, seen, dtype = gpt(idx, targets), set(), getattr(torch, dtype)
    for block in gpt.h:
        block.register_forward_hook(lambda module, args, out: seen.update((args[0].dtype, out.dtype)))
    with torch.autocast("cpu", dtype), monkeypatch.context() as patch:  # only inside: autocast itself asks these too
        patch.setattr(torch, "is_autocast_enabled", lambda name: name == device)
        patch.setattr(torch, "get_autocast_dtype", lambda name: dtype)
        loss = gpt(idx, targets)
    loss.backward()
    assert seen == {torch.bfloat16 if (device, dtype) == ("cuda", torch.bfloat16) else torch.float32}
    assert loss.item() == pytest.approx(exact.item(), abs=6e-2)
    assert all(p.grad.dtype == torch.float32 for p in gpt.parameters())


@variants
def test_options_that_save_memory_change_no_gradient(flags):
    x, y = batch()
    y[0, :5] = -1
    results = []
    for option in ("none", "activation_checkpointing", "chunked_loss"):
        gpt = make(flags, dropout=0.2).train()
        setattr(gpt, option, True)
        torch.manual_seed(2)  # of dropout
        loss = gpt(x, y)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in gpt.parameters())])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-6)


def test_what_they_keep_for_the_backward_pass():
    """Of each block its input alone; of the logits nothing."""

    def kept(**options):
        gpt, sizes = make(n_layer=4, vocab_size=1000), {}
        vars(gpt).update(options)
        params = {p.untyped_storage().data_ptr() for p in gpt.parameters()}

        def pack(tensor):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes() * (storage.data_ptr() not in params)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            gpt(*batch())
        return sum(sizes.values())

    B, T, C, V = 3, 32, 32, 1000
    assert kept() - kept(chunked_loss=True) >= 0.99 * 4 * B * T * V
    assert kept(chunked_loss=True, activation_checkpointing=True) < 4 * B * T * C * (4 + 6) + 10_000


def test_a_compiled_chunk_of_the_loss_is_a_graph_of_its_own():
    losses = []  # of each graph

    def backend(graph, inputs):
        losses.append(sum(node.target is F.cross_entropy for node in graph.graph.nodes))
        return graph

    eager, compiled = make(), make()
    eager.chunked_loss = compiled.chunked_loss = True
    compiled.compile(backend=backend)
    for gpt in (eager, compiled):
        gpt(*batch()).backward()
    assert (max(losses), sum(losses)) == (1, 1)
    torch.testing.assert_close([p.grad for p in compiled.parameters()], [p.grad for p in eager.parameters()])


def test_the_attention_kernel_is_in_the_compile_caches_key(monkeypatch):
    """cuDNN's attention is allowed without dropout only, and graphs of either choice are kept apart on disk."""
    from torch._inductor.codecache import FxGraphHashDetails  # what the key is made of

    tags, allowed = [], torch.backends.cuda.cudnn_sdp_enabled()
    with torch.compiler.config.patch(cache_key_tag=""):
        for dropout, deprioritized in ((0.0, "0"), (0.1, "0"), (0.0, "1")):
            monkeypatch.setenv("TORCH_CUDNN_SDPA_DEPRIORITIZED", deprioritized)
            model.choose_attention_kernel(dropout)
            assert torch.backends.cuda.cudnn_sdp_enabled() == (not dropout)
            tags.append(FxGraphHashDetails(None, [], {}, []).cache_key_tag)
            with model.without_cudnn():
                assert not torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(allowed)
    assert len(set(tags)) == 3
