import math

import pytest
import torch
import transformers
from torch.nn import functional as F

from model import GPT, GPTConfig, KVCache, causal_attention, one_product

TINY = dict(block_size=32, vocab_size=101, n_layer=2, n_head=4, n_embd=32)
VARIANTS = {
    "gpt2": {},
    "no bias": dict(bias=False),
    "qkv bias alone off, untied": dict(qkv_bias=False, tie_weights=False),
    "rope": dict(pos="rope"),
    "modern": dict(pos="rope", norm="rmsnorm", mlp="swiglu"),
    "modern no bias": dict(pos="rope", norm="rmsnorm", mlp="swiglu", bias=False, tie_weights=False),
    "relu2 qk-norm": dict(pos="rope", norm="rmsnorm", mlp="relu2", qk_norm=True, bias=False),
    "speed run": dict(
        pos="rope", norm="rmsnorm", mlp="relu2", qk_norm=True, rope_fraction=0.5, attn_scale=0.12, embed_norm=True,
        head_gate=12, value_embeds=1, tie_weights=False, head_bias=True, logit_softcap=15.0,
    ),
}  # fmt: skip
variants = pytest.mark.parametrize("flags", VARIANTS.values(), ids=VARIANTS.keys())


def make(flags=None, **more):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**TINY, **(flags or {}), **more}))
    for p in model.parameters():  # biases and norm gains away from 0 and 1, so that they are tested too
        if p.dim() == 1:
            p.data += 0.1 * torch.randn_like(p)
    return model.eval()


def batch(B=3, T=32):
    torch.manual_seed(1)
    tokens = torch.randint(TINY["vocab_size"], (B, T + 1))
    return tokens[:, :-1], tokens[:, 1:].clone()


MODERN = dict(vocab_size=50304, pos="rope", norm="rmsnorm", mlp="swiglu")


@pytest.mark.parametrize(
    ("flags", "count"),
    [
        (dict(), 124_439_808),
        (dict(vocab_size=50304), 124_475_904),
        (dict(vocab_size=50304, pos="rope"), 123_689_472),
        (MODERN, 123_682_560),
        (dict(MODERN, bias=False), 123_587_328),
        (dict(MODERN, mlp_hidden=3072), 152_018_688),
        (dict(MODERN, mlp_hidden=3072, bias=False), 151_898_880),
        (dict(n_layer=24, n_head=16, n_embd=1024), 354_823_168),
        (dict(n_layer=36, n_head=20, n_embd=1280), 774_030_080),
        (dict(n_layer=48, n_head=25, n_embd=1600), 1_557_611_200),
        (dict(vocab_size=52000, block_size=512), 125_385_216),
        (dict(n_layer=24, n_head=16, n_embd=1024, qkv_bias=False, tie_weights=False), 406_212_608),
        (dict(n_layer=36, n_head=20, n_embd=1280, qkv_bias=False, tie_weights=False), 838_220_800),
    ],
)
def test_parameter_counts(flags, count):
    with torch.device("meta"):
        model = GPT(GPTConfig(**flags))
    assert model.num_params() == count
    if flags == dict(vocab_size=50304):
        assert round(model.flops_per_token(1024) / 1e6) == 855


def compare(ours, theirs, pairs, chunk=None):
    """Loss, logits and every gradient against a transformers model whose weights were copied from ours."""
    idx, targets = batch()
    logits = ours(idx)
    loss = ours(idx, targets)
    loss.backward()
    out = theirs(idx, labels=idx)  # transformers shifts labels itself, so its loss is taken from the logits instead
    their_loss = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), targets.flatten())
    their_loss.backward()
    assert (logits - out.logits).abs().max() < 1e-5
    assert (loss - their_loss).abs() < 1e-6
    for our_grad, their_grad in pairs():
        assert our_grad.shape == their_grad.shape
        assert (our_grad - their_grad).abs().max() < 1e-5


@pytest.mark.parametrize("tie", [True, False])
def test_equals_transformers_gpt2(tie):
    ours = make(tie_weights=tie)
    config = transformers.GPT2Config(
        vocab_size=101, n_positions=32, n_embd=32, n_layer=2, n_head=4, tie_word_embeddings=tie,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    theirs = transformers.GPT2LMHeadModel(config).eval()

    def pairs(attr):
        """(ours, theirs) of every parameter; GPT-2's Conv1D holds matrices transposed, and q, k and v as one."""
        t = theirs.transformer
        got = lambda p: getattr(p, attr)  # noqa: E731
        yield got(ours.wte.weight), got(t.wte.weight)
        yield got(ours.wpe.weight), got(t.wpe.weight)
        if not tie:
            yield got(ours.lm_head.weight), got(theirs.lm_head.weight)
        for a, b in [(ours.ln_f, t.ln_f)] + [
            (getattr(x, n), getattr(y, n)) for x, y in zip(ours.h, t.h, strict=True) for n in ("ln_1", "ln_2")
        ]:
            yield got(a.weight), got(b.weight)
            yield got(a.bias), got(b.bias)
        for x, y in zip(ours.h, t.h, strict=True):
            for i, c in enumerate((x.attn.c_q, x.attn.c_k, x.attn.c_v)):
                yield got(c.weight), got(y.attn.c_attn.weight)[:, 32 * i : 32 * (i + 1)].T
                yield got(c.bias), got(y.attn.c_attn.bias)[32 * i : 32 * (i + 1)]
            for a, b in ((x.attn.c_proj, y.attn.c_proj), (x.mlp.c_fc, y.mlp.c_fc), (x.mlp.c_proj, y.mlp.c_proj)):
                yield got(a.weight), got(b.weight).T
                yield got(a.bias), got(b.bias)

    for a, b in pairs("data"):
        b.copy_(a)
    compare(ours, theirs, lambda: pairs("grad"))


@pytest.mark.parametrize("base", [10000.0, 500.0])
def test_equals_transformers_llama(base):
    ours = make(pos="rope", norm="rmsnorm", mlp="swiglu", bias=False, tie_weights=False, rope_base=base)
    config = transformers.LlamaConfig(
        vocab_size=101, hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, rms_norm_eps=1e-5, tie_word_embeddings=False,
        rope_parameters=dict(rope_type="default", rope_theta=base),
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval()

    def pairs(attr):
        m = theirs.model
        names = [(ours.wte, m.embed_tokens), (ours.ln_f, m.norm), (ours.lm_head, theirs.lm_head)]
        for x, y in zip(ours.h, m.layers, strict=True):
            a, s = x.attn, y.self_attn
            names += [(x.ln_1, y.input_layernorm), (x.ln_2, y.post_attention_layernorm)]
            names += [(a.c_q, s.q_proj), (a.c_k, s.k_proj), (a.c_v, s.v_proj), (a.c_proj, s.o_proj)]
            names += [(x.mlp.c_gate, y.mlp.gate_proj), (x.mlp.c_fc, y.mlp.up_proj), (x.mlp.c_proj, y.mlp.down_proj)]
        return [(getattr(p.weight, attr), getattr(q.weight, attr)) for p, q in names]

    for a, b in pairs("data"):
        b.copy_(a)
    compare(ours, theirs, lambda: pairs("grad"))


def test_init_scales():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=12, n_embd=192, n_head=6, vocab_size=512))
    for name, p in model.named_parameters():
        if p.dim() == 2:
            assert p.std().item() == pytest.approx(0.0041 if "c_proj" in name else 0.02, rel=0.02), name
        else:
            assert (p == ("ln" in name and "weight" in name)).all(), name


def test_targets_of_minus_one_do_not_count():
    model, (idx, targets) = make(), batch()
    targets[:, ::3] = -1
    logp = model(idx).log_softmax(-1)
    keep = targets >= 0
    brute = -logp[keep].gather(1, targets[keep][:, None]).mean()
    assert torch.allclose(model(idx, targets), brute, atol=1e-6)


def test_dropout_everywhere_or_nowhere():
    model, (idx, _) = make(dropout=0.5), batch()
    assert torch.equal(model(idx), make()(idx))  # eval: none
    model.train()
    assert not torch.equal(model(idx), model(idx))
    model.h[0].attn.dropout = 0.0
    for m in model.modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.0
    model.h[1].attn.dropout = 0.0
    assert torch.equal(model(idx), make()(idx))


@variants
def test_cached_logits_equal_uncached(flags):
    """Whatever the pieces a sequence is fed in: one by one, several behind a past, all at once."""
    model, (idx, _) = make(flags), batch()
    with torch.no_grad():
        whole = model(idx)
        for pieces in ([1] * 32, [5, 1, 10, 16], [32]):
            cache = KVCache(model.config, 3, 32)
            parts = [model(part, cache=cache) for part in idx.split(pieces, dim=1)]
            assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)


@variants
def test_a_tree_of_sequences_in_one_row(flags):
    """A trunk of 10 tokens, two branches of 7 and 9 behind it, and padding: each branch as if it stood there alone."""
    model, (idx, _) = make(flags), batch()
    trunk, left, right = idx[:, :10], idx[:, 10:17], idx[:, 17:26]
    positions = torch.tensor([*range(10), *range(10, 17), *range(10, 19), *[0] * 6]).expand(3, -1)
    segment = torch.tensor([0] * 10 + [1] * 7 + [2] * 9 + [3] * 6)
    mask = ((segment == segment[:, None]) | (segment == 0)).tril().expand(3, 1, -1, -1)
    with torch.no_grad():
        x = model.hidden(idx, positions=positions, mask=mask)
        for branch, here in ((left, x[:, 10:17]), (right, x[:, 17:26])):
            alone = model.hidden(torch.cat([trunk, branch], 1))
            assert torch.allclose(x[:, :10], alone[:, :10], atol=1e-5)
            assert torch.allclose(here, alone[:, 10:], atol=1e-5)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(n_head=5),
        dict(dropout=1.0),
        dict(n_layer=0),
        dict(pos="rope", n_head=32),
        dict(mlp_hidden=0),
        dict(rope_base=-1.0),
        dict(rope_fraction=0.0),
        dict(attn_scale=0.0),
        dict(logit_softcap=-15.0),
        dict(value_embeds=3),
        dict(head_gate=33),
        dict(init="zero"),
    ],
)
def test_impossible_configs(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        GPTConfig(**{**TINY, **wrong})


@pytest.mark.parametrize("scale", [None, 0.12])
def test_causal_attention_in_bfloat16_is_as_exact_as_torchs(scale):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 64, 32) for _ in range(3))
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    assert torch.allclose(causal_attention(q, k, v, scale), want, atol=1e-5)
    low = [x.bfloat16() for x in (q, k, v)]
    torchs = (F.scaled_dot_product_attention(*low, is_causal=True, scale=scale).float() - want).abs().max()
    assert (causal_attention(*low, scale).float() - want).abs().max() < 2 * torchs


@pytest.mark.parametrize("bias", [True, False])
def test_one_product_equals_three(bias):
    torch.manual_seed(0)
    x = torch.randn(3, 5, 32, requires_grad=True)
    projections = [torch.nn.Linear(32, 32, bias=bias) for _ in range(3)]
    inputs = [x, *(p for proj in projections for p in proj.parameters())]
    both = [one_product(projections, x), [proj(x) for proj in projections]]
    weights = torch.randn(3, 3, 5, 32)
    for ours, theirs in zip(*both, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
    grads = [torch.autograd.grad((torch.stack([*y]) * weights).sum(), inputs) for y in both]
    for ours, theirs in zip(*grads, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


@variants
@pytest.mark.parametrize(
    ("device", "dtype", "stream"),
    [
        ("cuda", torch.bfloat16, torch.bfloat16),
        ("cuda", torch.float16, torch.float32),  # whose largest number is 65,504
        ("cpu", torch.bfloat16, torch.float32),
    ],
)
def test_dtype_of_the_residual_stream(monkeypatch, flags, device, dtype, stream):
    """bfloat16 under autocast on a GPU only. Here a CPU says that its autocast is a GPU's."""
    model, (idx, targets) = make(flags), batch()
    exact = model(idx, targets)
    seen = set()
    for block in model.h:
        block.register_forward_hook(lambda module, args, out: seen.update((args[0].dtype, out.dtype)))
    with torch.autocast("cpu", dtype), monkeypatch.context() as patch:  # only inside: autocast itself asks these too
        patch.setattr(torch, "is_autocast_enabled", lambda name: name == device)
        patch.setattr(torch, "get_autocast_dtype", lambda name: dtype)
        loss = model(idx, targets)
    loss.backward()
    assert seen == {stream}
    assert loss.item() == pytest.approx(exact.item(), abs=3e-2)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_untrained_loss_is_that_of_a_uniform_guess():
    idx, targets = batch()
    assert make()(idx, targets).item() == pytest.approx(math.log(101), abs=0.1)


@variants
def test_options_that_save_memory_change_no_gradient(flags):
    x, y = batch()
    y[0, :5] = -1
    results = []
    for option in (None, "activation_checkpointing", "chunked_loss"):
        model = make(flags, dropout=0.2).train()
        if option:
            setattr(model, option, True)
        torch.manual_seed(2)  # of dropout
        loss = model(x, y)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_what_they_keep_for_the_backward_pass():
    """Of each block its input alone; of the logits nothing."""

    def kept(**options):
        model, sizes = make(n_layer=4, vocab_size=1000), {}
        for name in options:
            setattr(model, name, True)
        params = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in params:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(*batch())
        return sum(sizes.values())

    B, T, C, V = 3, 32, 32, 1000
    plain, chunked = kept(), kept(chunked_loss=True)
    assert plain - chunked >= 0.99 * 4 * B * T * V
    assert kept(chunked_loss=True, activation_checkpointing=True) < 4 * B * T * C * (4 + 6) + 10_000


def test_a_compiled_chunk_of_the_loss_is_a_graph_of_its_own():
    losses = []  # of each graph

    def backend(graph, inputs):
        losses.append(sum(node.target is F.cross_entropy for node in graph.graph.nodes))
        return graph

    eager, compiled = make(), make()
    eager.chunked_loss = compiled.chunked_loss = True
    compiled.compile(backend=backend)
    for model in (eager, compiled):
        model(*batch()).backward()
    assert (max(losses), sum(losses)) == (1, 1)
    for a, b in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize(("flag", "value"), [("mlp", "geglu"), ("norm", "none"), ("pos", "alibi")])
def test_a_flag_that_only_its_literal_knows_is_an_error(flag, value):
    """And never trains silently as another variant."""
    with pytest.raises(NotImplementedError, match=f"{flag} = '{value}'"):
        GPT(GPTConfig(block_size=4, vocab_size=8, n_layer=1, n_head=1, n_embd=4, **{flag: value}))(
            torch.zeros(1, 2).long()
        )
