"""Random input to everything that reads some: it is refused in one line and status 2, or it means exactly what it says.

In the suite a few hundred inputs, always the same. FUZZ=full pytest tests/test_fuzz.py tries some twenty thousand, new
ones each time; what fails is printed as small as hypothesis can make it. --hypothesis-seed=N makes a run repeatable.
"""
# ruff: noqa: PT017  (to be refused is one of the right ends)

import ast
import contextlib
import functools
import gzip
import io
import json
import math
import os
import runpy
import struct
import tempfile
import types
import typing
import warnings
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import safetensors.torch
import sources
import tokenizers
import torch
from conftest import TRAIN, call, run
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from shards import shard_header, shard_tokens
from test_tokenizer import TEXTS
from weights import load_model

import fineweb
from configurator import PathStr, UserError, configure
from dataloader import Windows
from evaluate import EvaluateConfig
from fineweb import DataConfig
from hellaswag import HellaSwagConfig
from huggingface import ExportConfig
from model import GPTConfig
from report import ReportConfig
from sample import SampleConfig
from tokenizer import get_tokenizer
from train_gpt2 import TrainConfig

FULL = os.environ.get("FUZZ") == "full"


def cases(small, full):
    """So many inputs in the suite, and so many with FUZZ=full."""
    return settings(
        max_examples=full if FULL else small, derandomize=not FULL, deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


def check_line(error):
    message = str(error)
    assert message.strip()
    assert len(message.splitlines()) == 1
    return message


def check_refused(done):
    """Of a finished process: status 2 and one line, or the help."""
    assert done.returncode in (0, 2), done
    if done.returncode == 2:
        assert done.stderr.startswith("error: "), done.stderr
        assert done.stderr.count("\n") == 1, done.stderr


@pytest.fixture
def folder():
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


# Command lines


@dataclass(frozen=True)
class Plain:
    """An option of every type, and no rules."""

    whole: int = 1
    maybe_whole: int | None = None
    number: float = 1.0
    maybe_number: float | None = None
    switch: bool = False
    maybe_switch: bool | None = None
    text: str = "text"
    maybe_text: str | None = None
    choice: Literal["one", "two", "None", "2024"] = "one"
    maybe_choice: Literal["one", "two"] | None = None


SCRIPTS = {
    "train_gpt2.py": (TrainConfig, GPTConfig),
    "fineweb.py": (DataConfig,),
    "sample.py": (SampleConfig,),
    "report.py": (ReportConfig,),
    "evaluate.py": (EvaluateConfig,),
    "hellaswag.py": (HellaSwagConfig,),
    "huggingface.py": (ExportConfig,),
    "plain": (Plain,),
}
# fmt: off
VALUES = [
    "", " ", "0", "1", "-1", "+1", "- 1", "--1", "~1", "1.", "1.5", "-0.0", "010", "1_000", "0x10", "0b1", "1e3",
    "1e3.", "1e22", "1e23", "1e400", "-1e400", "1e-400", "nan", "inf", "-inf", "NaN", "Infinity", "9" * 19, "9" * 20,
    "9" * 400, "9" * 5000, str(2**53), f"{2**53}.0", str(2**63), str(-(2**63)), "1" + "0" * 30, "True", "true", "FALSE",
    "yes", "on", "none", "None", "null", "'None'", "'1'", '"a b"', "'a' 'b'", "'''a'''", "'a\\nb'",
    "'", "b'a'", "f'a'", "r'\\'", "u'a'", "[]", "[1, 2]", "{}", "{[]: 1}", "{{}}", "{1: 2}",
    "{1}", "()", "(1)", "(1,)", "...", "1+2j", "1j", "1 + 1", "1 # one", "#", "\\", "\t1", "1\n", "a\nb",
    "a\rb", "\x1b[31m", "\u2028", "１", "٣", "é", "🙂", "(" * 300, "[" * 5000, "-" * 5000 + "1",
    "1+" * 3000 + "1", "lambda: 1", "__import__('os')", "$HOME", "~", "~nobody/x", ".", "..", "/", "//", "/dev/null",
    "=", "==1", "--whole=1", "a" * 300, "a/" * 3000, "x" * 100_000, "cpu", "cuda:99", "meta", "cuda:-1", "mps", "adamw",
    "Adamw", "'adamw'", "rope", "bytes", "one", "None", "2024", "train+", "+",
]
# fmt: on
VALUE = st.one_of(
    st.sampled_from(VALUES),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=9),
    st.integers().map(str),
    st.integers(-9, 2000).map(str),
    st.floats().map(repr),
    st.floats(0, 1).map(repr),
)


@functools.cache
def hints(script):
    return {name: hint for cls in SCRIPTS[script] for name, hint in typing.get_type_hints(cls).items()}


@functools.cache
def paths(script):
    """The names of options that may begin with ~/"""
    extras = [typing.get_type_hints(cls, include_extras=True) for cls in SCRIPTS[script]]
    return {name for hints in extras for name, hint in hints.items() if PathStr in (hint, *typing.get_args(hint))}


def texts_of(hint):
    """Nearly always right for an option of this type."""
    if typing.get_args(hint):
        choices = [st.just(str(kind)) if isinstance(kind, str) else texts_of(kind) for kind in typing.get_args(hint)]
        return st.one_of(choices)
    right = {
        int: st.integers(1, 3000).map(str) | st.sampled_from(["1e3", "1_000", "2.0"]),
        float: st.floats(0, 1).map(repr) | st.integers(0, 9).map(str) | st.just("3e-4"),
        bool: st.sampled_from(["True", "False", "true", "FALSE"]),
        str: st.sampled_from(["a", "out/x", "2024", "'quoted'", "none", "1e3", "a b=c", "é"]),
        type(None): st.sampled_from(["none", "None"]),
    }
    return right[hint]


def flags(script):
    """One or two arguments: nearly always --name=value."""
    known = sorted(hints(script))
    name = st.sampled_from(known)
    typo = st.tuples(name, st.integers(0, 20), st.sampled_from(["", "x", "-", "_", " ", "é", "\n", "="])).map(
        lambda t: t[0][: t[1]] + t[2] + t[0][t[1] + 1 :]
    )
    fitting = [
        st.tuples(st.just(name), VALUE | texts_of(hint) | texts_of(hint)) for name, hint in hints(script).items()
    ]
    flag = st.one_of(fitting).map(lambda t: [f"--{t[0]}={t[1]}"])
    shapes = "--{}|-{}={}|{}={}|--{}=={}|--{}= {}|—{}={}|--no-{}|--{}:{}|--|-||{1}|---{}={}".split("|")
    odd = st.tuples(st.sampled_from(shapes), name | typo, VALUE).map(lambda t: [t[0].format(t[1], t[2])])
    two = st.tuples(name, VALUE).map(lambda t: [f"--{t[0]}", t[1]])
    wrong = st.tuples(typo, VALUE).map(lambda t: [f"--{t[0]}={t[1]}"])
    fixed = st.sampled_from([["--help"], ["-h"], ["--version"], ["nothere.py"]])
    return st.integers(0, 30).flatmap(lambda i: [odd, two, wrong, fixed][i] if i < 4 else flag)


def arguments(script, most=5):
    return st.lists(flags(script), max_size=most).map(lambda lists: [arg for args in lists for arg in args])


def kinds_of(hint):
    """A union's members; any other type alone."""
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def reading(text, hint):
    """[what the text says to an option of this type], or [] where it says nothing that fits."""
    words = {"true": True, "false": False, "none": None}
    literal = ...
    if text.lower() in words:
        literal = words[text.lower()]
    else:
        with warnings.catch_warnings(), contextlib.suppress(Exception):
            warnings.simplefilter("ignore")
            literal = ast.literal_eval(text)
    kinds = kinds_of(hint)
    if literal is None and type(None) in kinds:
        return [None]
    if bool in kinds:
        return [literal] if literal is True or literal is False else []
    choices = [choice for kind in kinds if typing.get_origin(kind) is Literal for choice in typing.get_args(kind)]
    if str in kinds or choices:
        value = literal if isinstance(literal, str) else text
        if choices:
            return [value] if value in choices else [text] if text in choices else []
        return [value]
    if type(literal) is int and -(2**63) <= literal < 2**63:
        return [float(literal) if float in kinds else literal]
    if type(literal) is float and float in kinds and abs(literal) < math.inf:
        return [literal]
    if type(literal) is float and int in kinds and -(2**63) <= literal < 2**63 and literal.is_integer():
        return [math.floor(literal)]
    return []


def allowed(value, hint):
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    if len(kinds_of(hint)) > 1:
        return any(allowed(value, kind) for kind in kinds_of(hint))
    return value is None if hint is type(None) else type(value) is hint and (hint is not float or math.isfinite(value))


def fields(instances):
    return {name: value for instance in instances for name, value in vars(instance).items()}


def same(a, b):
    return type(a) is type(b) and (a == b or (a != a and b != b)) and str(a) == str(b)  # -0.0 is not 0.0


@pytest.mark.parametrize("script", SCRIPTS)
@cases(40, 1500)
@given(data=st.data())
def test_command_lines(script, data):
    argv = data.draw(arguments(script))
    classes, types_of = SCRIPTS[script], hints(script)
    given_texts, wrong = {}, []
    for arg in argv:
        name, equals, text = arg.removeprefix("--").partition("=")
        if arg.startswith("--") and equals and name in types_of:
            given_texts[name] = text
            wrong += [] if reading(text, types_of[name]) else [arg]
        else:
            wrong.append(arg)
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            *instances, where = configure(*classes, argv=argv)
    except SystemExit as end:
        assert end.code == 0
        assert "--help" in argv or "-h" in argv
        assert all(f"--{name}=" in out.getvalue() for name in types_of)
        return
    except UserError as error:
        message = check_line(error)
        names = [arg.lstrip("-").partition("=")[0] for arg in argv]
        assert any(" ".join(name.splitlines()) in message for name in names)
        assert wrong or script != "plain"  # the others have rules
        return
    assert not wrong
    assert where == {name: f"--{name}" for name in given_texts}
    values = fields(instances)
    assert all(allowed(values[name], hint) for name, hint in types_of.items())
    for name, text in given_texts.items():
        if text.lower() != "none" or script != "fineweb.py":  # whose None means what the other options leave
            [said] = reading(text, types_of[name])
            said = os.path.expanduser(said) if name in paths(script) and said else said
            assert same(values[name], said), (name, text, values[name])
    if script == "train_gpt2.py":
        config = instances[0]
        assert 0 <= config.seed < 2**64
        assert 0 <= config.min_lr <= config.learning_rate
        assert 0 <= config.beta1 < 1 > config.beta2 >= 0
        assert min(config.weight_decay, config.grad_clip, config.warmup_steps or 0, config.val_interval) >= 0
        assert min(config.batch_size, config.total_batch_size or 1, config.log_interval) >= 1
        assert "" not in (config.out_dir, config.data_dir)


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script.endswith(".py")])
@cases(12, 300)
@given(data=st.data())
def test_whole_scripts_up_to_refusing(script, data):
    argv = data.draw(arguments(script, most=3))
    argv = [arg for arg in argv if "tokenizer" not in arg]  # which may be downloaded
    missing = {
        "train_gpt2.py": ["--data_dir=nothere/data"],
        "fineweb.py": ["--files=nothere/*", "--num_proc=1"],
        "sample.py": ["--model=nothere"],
        "report.py": ["nothere/run"],
        "evaluate.py": ["--model=nothere"],
        "hellaswag.py": ["--model=nothere"],
        "huggingface.py": ["--model=nothere", "--out_dir=nothere/hf"],
    }
    done = call(script, *argv, *missing[script])
    check_refused(done)
    assert (done.returncode == 0) == ("--help" in argv or "-h" in argv)


# Config files

# fmt: off
LINES = [
    "import math", "import os as _os", "from math import pi", "from math import *", "from math import pi as number", "",
    "import math as whole", "from math import floor as switch", "import nothere", "import whole",
    "import math; math = 3", "raise ValueError('a\\nb')",
    "assert False", "raise KeyError", "raise SyntaxError('x')",
    "raise UnicodeError('x')",
    "class _E(Exception): pass\nraise _E('\\n\\n')",
    "class _R:\n    __repr__ = lambda _: 'a\\nb'\ntext = _R()", "def whole(): return 1", "class whole: pass",
    "def _f(x): return 2 * x\nwhole = _f(4)", "whole = lambda: 1", "print = 3", "for whole in range(3): pass",
    "if True:\n    whole = 5", "whole, number = 2, 3.5", "whole = number = 2", "whole += 1",
    "with open('nothere'): pass", "int = 3", "_list = [x for x in range(3)]", "text = str(1)", "__name__ = 3",
    "del text", "exec('whole = 7')", "globals()['whole'] = 8", "eval('1 +')", "exec('1 +')",
    "whole: int = 6", "text: str", "whole = True", "number = float('nan')",
    "number = float('inf')", "number = 1e400", "whole = 1e400", "whole = 4e0", "text = b'a'",
    "text = 'a\\0'", "text = '\\ud800'", "text = ''", "text = None", "whole = [1] * 10 ** 5", "text = 'x' * 10 ** 6",
    "choice = 'x' * 10 ** 6", "maybe_whole = None", "whole = None", "switch = 1",
    "whole = (", "  whole = 1", "\twhole = 1", "whole = 1 2", "whole == 1", "1 = whole",
    "whole = whole", "def f(:", "'''", "await x", "yield 1", "return 1", "break", "x" * 1000, "ｗｈｏｌｅ = 3",
    "été = 3",
    "\f", "\\", "(" * 150 + ")" * 150, "whole = " + "(" * 250 + "1" + ")" * 250, "whole = " + "-" * 3000 + "1",
    "from __future__ import nothere",
    "def _f(): return _f()\n_f()", "import this_file", "import d", "# -*- coding: latin-1 -*-", "# coding: nothere",
    "# coding: utf-16", "import numpy as _n; whole = _n.int64(3)", "text = 'é'",
    "import fractions as _f; number = _f.Fraction(1, 2)",
    "import enum as _e\nclass _E(_e.IntEnum): A = 1\nwhole = _E.A", "widht = 1",
    "import pathlib as _p; text = _p.Path('x')", "whole = type('int', (int,), {})(3)",
    "from d import whole; whole = whole * 2",
]
# fmt: on
SPOILS = ["none"] * 12 + ["bom", "crlf", "cr", "nul", "latin", "utf16", "cut", "byte", "no newline"]


@st.composite
def config_files(draw):
    values = st.one_of(
        st.integers(), st.floats(), st.booleans(), st.none(), st.text(max_size=5), st.sampled_from(["one", "two"])
    )
    assignment = st.tuples(st.sampled_from(sorted(hints("plain"))), values).map(lambda t: f"{t[0]} = {t[1]!r}")
    lines = draw(st.lists(assignment | st.sampled_from(LINES), max_size=5))
    source = "\n".join(lines).replace("= nan", "= float('nan')").replace("= inf", "= float('inf')") + "\n"
    data, spoil = source.encode(errors="replace"), draw(st.sampled_from(SPOILS))
    place = draw(st.integers(0, len(data)))
    return {
        "none": data, "bom": b"\xef\xbb\xbf" + data,
        "crlf": data.replace(b"\n", b"\r\n"), "cr": data.replace(b"\n", b"\r"),
        "nul": data[:place] + b"\0" + data[place:], "latin": source.encode("latin-1", "replace"),
        "utf16": source.encode("utf-16", "replace"), "cut": data[:place],
        "byte": data[:place] + bytes([draw(st.integers(0, 255))]) + data[place + 1 :], "no newline": data.rstrip(b"\n"),
    }[spoil]  # fmt: skip


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    """Somewhere to import a module d from."""
    path = tmp_path_factory.mktemp("modules")
    (path / "d.py").write_text("whole = 21\nother = 4\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(path))
        yield


@cases(150, 5000)
@given(source=config_files())
@example(b"from d import whole; whole = whole * 2\n")
@example(b"text = '\xe9'\n")
def test_config_files(modules, source):
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "c.py")
        path.write_bytes(source)
        try:
            plain, where = configure(Plain, argv=[str(path)])
        except UserError as error:
            assert str(path) in check_line(error)
            return
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            said = runpy.run_path(str(path), run_name="config")
    types_of = hints("plain")
    public = {name for name in said if not name.startswith("_")}
    assert set(where) == public & set(types_of)
    strange = [name for name in public - set(types_of) if not isinstance(said[name], types.ModuleType)]
    assert not strange or b"import" in source
    for name, hint in types_of.items():
        value = getattr(plain, name)
        assert allowed(value, hint)
        assert value == said.get(name, getattr(Plain, name))
        assert type(said.get(name, value)) in (type(value), int, float)


@pytest.mark.parametrize("kind", ["folder", "missing", "unreadable", "loop", "not .py", "long"])
def test_config_files_that_are_none(tmp_path, kind):
    path = tmp_path / "c.py"
    if kind == "folder":
        path.mkdir()
    elif kind == "unreadable":
        path.write_text("whole = 1")
        path.chmod(0)
        if os.access(path, os.R_OK):
            pytest.skip("root reads everything")
    elif kind == "loop":
        path.symlink_to(path)
    name = {"not .py": "c.txt", "long": "x" * 5000 + ".py"}.get(kind, str(path))
    with pytest.raises(UserError) as error:
        configure(Plain, argv=[name])
    assert name in check_line(error.value)


# Shards

INT32 = st.integers(-(2**31), 2**31 - 1)


@st.composite
def shard_files(draw):
    tokens = draw(st.lists(st.integers(0, 65535), max_size=40))
    data = shard_header(len(tokens)) + struct.pack(f"<{len(tokens)}H", *tokens)
    what = draw(st.sampled_from(["whole", "header", "rest", "cut", "longer", "big-endian", "noise", "count", "short"]))
    if what == "header":
        data = struct.pack("<3i", *[draw(INT32 | st.just(right)) for right in (20240520, 1, len(tokens))]) + data[12:]
    elif what == "rest":
        data = data[:12] + draw(st.binary(min_size=1012, max_size=1012)) + data[1024:]
    elif what == "cut":
        data = data[: draw(st.integers(0, len(data)))]
    elif what == "longer":
        data += draw(st.binary(max_size=3))
    elif what == "big-endian":
        data = struct.pack(">3i", 20240520, 1, len(tokens)) + data[12:]
    elif what == "noise":
        data = draw(st.binary(max_size=2000))
    elif what == "count":
        data = struct.pack("<3i", 20240520, 1, len(tokens) + draw(st.integers(-3, 3))) + data[12:]
    elif what == "short":  # as long as a negative count says
        count = draw(st.integers(-512, -1))
        data = (struct.pack("<3i", 20240520, 1, count) + data[12:])[: 1024 + 2 * count]
    return data


def shard_oracle(data):
    """The tokens in the bytes of a file, None where they are no shard."""
    if len(data) < 1024:
        return None
    magic, version, count = struct.unpack_from("<3i", data)
    if (magic, version) != (20240520, 1) or len(data) - 1024 != 2 * count:
        return None
    return list(struct.unpack_from(f"<{count}H", data, 1024))


@cases(150, 2500)
@given(data=shard_files())
def test_shards(data):
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "x_train_000001.bin")
        path.write_bytes(data)
        tokens = shard_oracle(data)
        try:
            count = shard_tokens(path)
        except UserError as error:
            assert str(path) in check_line(error)
            assert tokens is None
            return
        assert tokens is not None
        assert count == len(tokens)


def test_shards_cut_anywhere(folder):
    path = folder / "x_train_000001.bin"
    data = shard_header(5) + bytes(10)
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(UserError, match="x_train_000001"):
            shard_tokens(path)
    path.write_bytes(data)
    assert shard_tokens(path) == 5


@cases(40, 1000)
@given(files=st.lists(shard_files(), min_size=1, max_size=3), seq_len=st.integers(1, 9))
def test_windows(files, seq_len):
    shards = [shard_oracle(data) for data in files]
    with tempfile.TemporaryDirectory() as name:
        for number, data in enumerate(files):
            Path(name, f"x_train_{number:06d}.bin").write_bytes(data)
        try:
            windows = Windows(name, "train", seq_len)
        except UserError as error:
            assert name in check_line(error)
            assert None in shards or max(map(len, shards)) <= seq_len
            return
        starts = [shard[i : i + seq_len + 1] for shard in shards for i in range(0, len(shard) - seq_len, seq_len)]
        x, y = windows.read(np.arange(len(windows)))
        assert (x.tolist(), y.tolist()) == ([tokens[:-1] for tokens in starts], [tokens[1:] for tokens in starts])


# Data preparation


@pytest.fixture(scope="module")
def small():
    """Small pieces, batches and blocks, so that small data has many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fineweb, "PIECE", 30)
        patch.setattr(fineweb, "BATCH", 50)
        patch.setattr(sources, "ROWS", 3)
        patch.setattr(sources, "BLOCK", 16)
        yield


def prepare(out_dir, **options):
    """meta.json of the prepared data, or the line that refuses it."""
    options = {"out_dir": str(out_dir), "tokenizer": "bytes", "num_proc": 1, "val_fraction": 0.5, **options}
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            fineweb.prepare(DataConfig(**options))
    except UserError as error:
        assert not (out_dir / "meta.json").exists()
        return check_line(error)
    return json.loads((out_dir / "meta.json").read_text())


def read_split(out_dir, split):
    tokens = []
    for path in sorted(out_dir.glob(f"*_{split}_*.bin")):
        data = path.read_bytes()
        assert shard_oracle(data) is not None
        tokens += shard_oracle(data)
    return tokens


def in_utf8(text):
    """Half a surrogate pair, as JSON can spell it, becomes U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def check_prepared(out_dir, meta, documents):
    """Both splits hold these documents, by bytes."""
    if len(documents) == 1:
        middle = int(len(documents[0]) * Fraction(1, 2))
        parts = {"train": [documents[0][:middle]], "val": [documents[0][middle:]]}
    else:
        parts = {"train": documents[: len(documents) // 2], "val": documents[len(documents) // 2 :]}
    for split, texts in parts.items():
        tokens = [token for text in texts for token in (256, *in_utf8(text))]
        assert read_split(out_dir, split) == tokens
        assert meta[f"{split}_tokens"] == len(tokens)
        assert meta[f"{split}_bytes"] == len(tokens) - len(texts)
        if all(len(text) - len(text.strip()) < 30 for text in texts):  # a whole piece of white space counts as words
            assert meta[f"{split}_words"] == sum(len(text.strip().split(" ")) for text in texts)


def check_source(data, suffix, documents, **options):
    """Prepare data from such a file: what comes out are these documents, or (None) one line and nothing else."""
    with tempfile.TemporaryDirectory() as name:
        path, out_dir = Path(name, f"a{suffix}"), Path(name, "out")
        path.write_bytes(data)
        result = prepare(out_dir, files=str(path), **options)
        if isinstance(result, dict):
            assert documents is not None
            check_prepared(out_dir, result, documents)
            return
        assert not documents or [len(text) < 2 for text in documents] == [True], result  # too little for two splits
        assert path.name in result or "no text is left" in result, result
        assert not list(out_dir.glob("*.bin"))
        (Path(name) / "right.txt").write_text("right")
        assert isinstance(prepare(out_dir, files=f"{name}/right.txt"), dict)


TEXT = st.text(st.characters(codec="utf-8"), max_size=60) | st.sampled_from(TEXTS)
TEXT |= st.text("ab é中🙂\r\n\t\0,.\ufeff\u2028\x85", max_size=120)


@cases(40, 1500)
@given(
    data=st.one_of(TEXT.map(str.encode), st.binary(max_size=80), TEXT.map(lambda t: t.encode("utf-16"))),
    cut=st.integers(0, 80),
)
def test_text_files(small, data, cut):
    data = data[:cut] if cut % 2 else data
    try:
        documents = [data.decode("utf-8-sig")]  # a byte order mark is no text
    except UnicodeDecodeError:
        documents = None
    check_source(data, ".txt", documents)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "a", "\n", ""]), inner, max_size=3)
    ),
    max_leaves=8,
)
TEXT_ROW = st.builds(
    lambda text, rest: {**rest, "text": text},
    TEXT | st.text(max_size=9),
    st.dictionaries(st.text(max_size=2), JSON, max_size=2),
)
# fmt: off
BAD_LINES = [
    b"[" * 100_000, b'{"text": "a"', b'{"text": "\xff"}', b'{"text": "\xed\xa0\x80"}', b"\0",
    b'{"text": "a"}{"text": "b"}', b"null", b'{"text": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    b'{"text": ' + b"9" * 5000 + b"}", b'{"text": null}', b'{"txt": "a"}', b'"', b'\xef\xbb\xbf{"text": "a"}',
    b'{"text": "\\ud83d"}', b'{"text": "\\ud83d\\ude00"}', b'{"text": "\t"}', b"{'text': 'a'}", b"{}",
    '{"text": "a"}'.encode("utf-16"), b'{"text": "a", "text": "b"}', b'{"text": NaN}', b"\x0c", b" \t\r",
    b'{"text": ["a"]}',
]
# fmt: on
LINE = st.one_of(
    TEXT_ROW.map(lambda row: json.dumps(row).encode()),
    TEXT_ROW.map(lambda row: json.dumps(row, ensure_ascii=False).encode(errors="replace")),
)


def read_lines(data):
    """The documents of a .jsonl, None where a line is wrong."""
    documents = []
    try:
        for line in data.decode("utf-8-sig").split("\n"):
            if line.strip(" \t\r\f\v"):
                documents.append(json.loads(line)["text"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return documents if all(isinstance(text, str) for text in documents) else None


@st.composite
def line_files(draw):
    bad = st.sampled_from(BAD_LINES) | st.binary(max_size=9)
    lines = draw(st.lists(LINE, max_size=6) | st.lists(LINE | bad, max_size=6))
    end = draw(st.sampled_from([b"\n"] * 3 + [b"\r\n", b"\n\n", b"\r"]))
    data = end.join(lines) + draw(st.sampled_from([end, b""]))
    return data[: draw(st.integers(0, len(data)))] if draw(st.integers(0, 9)) == 0 else data


@cases(50, 2000)
@given(data=line_files())
def test_jsonl(small, data):
    check_source(data, ".jsonl", read_lines(data))


@st.composite
def spoiled(draw, whole):
    """The bytes of a file, most often damaged."""
    data = bytearray(draw(whole))
    what = draw(st.sampled_from(["whole", "cut", "flip", "flips", "zeros", "longer", "noise"]))
    place = draw(st.integers(0, max(0, len(data) - 1)))
    if what == "cut":
        del data[place:]
    elif what in ("flip", "flips") and data:
        for _ in range(1 if what == "flip" else 20):
            data[place] ^= 1 << draw(st.integers(0, 7))
            place = draw(st.integers(0, len(data) - 1))
    elif what == "zeros":
        data[place : place + 9] = bytes(len(data[place : place + 9]))
    elif what == "longer":
        data += draw(st.binary(max_size=9))
    elif what == "noise":
        return draw(st.binary(max_size=99))
    return bytes(data)


@cases(40, 1500)
@given(data=spoiled(line_files().map(functools.partial(gzip.compress, mtime=0))))
def test_gzip(small, data):
    try:
        documents = read_lines(gzip.decompress(data))
    except Exception:  # whatever: the oracle's refusals
        documents = None
    check_source(data, ".jsonl.gz", documents)


COLUMNS = [
    ("string", TEXT),
    ("large_string", TEXT),
    ("string_view", TEXT),
    ("binary", st.binary(max_size=9)),
    ("int64", st.integers(0, 9)),
]


@st.composite
def parquet_files(draw):
    kind, values = draw(st.sampled_from([COLUMNS[0]] * 4 + COLUMNS))
    texts = draw(st.lists(values | st.none(), max_size=9))
    column = pyarrow.array(texts, getattr(pyarrow, kind)())
    names = draw(
        st.sampled_from(
            [["text"]] * 5 + [["text", "text"], ["text", "id"], ["txt"], ["", "text"], ["a.text", "text"], []]
        )
    )
    if kind == "string" and draw(st.integers(0, 5)) == 0:
        column = pyarrow.DictionaryArray.from_arrays(
            pyarrow.array([0] * len(texts), pyarrow.int32()), pyarrow.array(["a"])
        )
    elif kind == "binary" and draw(st.booleans()):  # bytes that are said to be text
        column = pyarrow.Array.from_buffers(pyarrow.string(), len(column), column.buffers())
    sink = io.BytesIO()
    pyarrow.parquet.write_table(
        pyarrow.Table.from_arrays([column] * len(names), names), sink, row_group_size=draw(st.integers(1, 9)),
        compression=draw(st.sampled_from(["none", "snappy", "gzip", "zstd", "lz4", "brotli"])),
        use_dictionary=draw(st.booleans()), write_page_checksum=draw(st.booleans()),
        data_page_version=draw(st.sampled_from(["1.0", "2.0"])),
    )  # fmt: skip
    return sink.getvalue()


def read_rows(data):
    """The documents of a Parquet file, None where it has no column of text or is damaged."""
    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data), page_checksum_verification=True)
        table = file.read(["text"])
        if len(table) != file.metadata.num_rows:  # a damaged page, of which pyarrow says nothing
            return None
        column = table.column("text")
        kind = column.type.value_type if pyarrow.types.is_dictionary(column.type) else column.type
        if not any(str(kind) == name for name in ("string", "large_string", "string_view")):
            return None
        return [text or "" for text in column.to_pylist()]
    except Exception:  # whatever: the oracle's refusals
        return None


@cases(50, 2000)
@given(data=spoiled(parquet_files()) | parquet_files())
def test_parquet(small, data):
    check_source(data, ".parquet", read_rows(data))


@cases(10, 150)
@given(data=st.data())
def test_whole_preparations(data):
    """As the command."""
    files = {".txt": st.binary(max_size=40), ".jsonl": line_files(), ".parquet": spoiled(parquet_files())}
    suffix = data.draw(st.sampled_from([*files, ".json"]))
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, f"a{suffix}")
        path.write_bytes(data.draw(files[suffix] if suffix in files else tokenizer_files()))
        options = [f"--tokenizer={path if suffix == '.json' else 'bytes'}", f"--files={path}", "--val_fraction=0.5"]
        done = call("fineweb.py", *options, f"--out_dir={name}/out", "--num_proc=1")
        check_refused(done)
        assert (done.returncode == 0) == Path(name, "out", "meta.json").exists()


# What a preparation left behind


def paths_of(data, path=()):
    """The places in nested JSON."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else []
    return [path, *(inner for key, value in items for inner in paths_of(value, (*path, key)))]


WRONG = [None, True, -1, 1.5, "1", "", [], {}, [[]], {"a": 1}, "é\n", math.nan]


def changed(draw, data, places, values):
    """Nested JSON with one value removed or replaced."""
    data = json.loads(json.dumps(data))
    *path, last = draw(st.sampled_from([place for place in places if place]))
    inner = functools.reduce(lambda inner, key: inner[key], path, data)
    if draw(st.booleans()):
        inner[last] = draw(st.sampled_from(values))
    else:
        del inner[last]
    return data


@pytest.fixture(scope="module")
def preparations(small, tmp_path_factory):
    """A function (hypothesis prints arguments): {name: bytes} of a killed and of a whole preparation, their source."""
    folder = tmp_path_factory.mktemp("preparations")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": f"document {i} " * (i % 7)}) + "\n" for i in range(30)))
    replace, left = os.replace, 12

    def die(source, target):
        nonlocal left
        left -= 1
        if not left:
            raise UserError("killed")
        replace(source, target)

    states = []
    for stop in (die, replace):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "replace", stop)
            prepare(folder / "out", files=f"{folder}/a.jsonl", shard_tokens=100)
        states.append({path.name: path.read_bytes() for path in (folder / "out").iterdir()})
    assert "progress.json" in states[0]
    assert 3 < len(states[0]) < len(states[1])
    return lambda: (*states, f"{folder}/a.jsonl")


@pytest.mark.parametrize("name", ["progress.json", "meta.json"])
@cases(40, 600)
@given(data=st.data())
def test_damaged_state_of_a_preparation(preparations, name, data):
    killed, finished, files = preparations()
    before = dict(finished if name == "meta.json" else killed)
    content = json.loads(before[name])
    how = data.draw(st.sampled_from(["value", "value", "value", "cut", "noise", "other", "shard", "no shard"]))
    if how == "value":
        before[name] = json.dumps(changed(data.draw, content, paths_of(content), WRONG)).encode()
    elif how == "cut":
        before[name] = before[name][: data.draw(st.integers(0, len(before[name]) - 1))]
    elif how == "noise":
        before[name] = data.draw(st.binary(max_size=40))
    elif how == "other":
        before[name] = json.dumps(data.draw(JSON)).encode()
    elif name == "progress.json":
        shard = data.draw(st.sampled_from(sorted(path for path in before if path.endswith(".bin"))))
        before[shard] = before[shard][: data.draw(st.integers(0, len(before[shard])))]
        if how == "no shard":
            del before[shard]
    with tempfile.TemporaryDirectory() as folder:
        out_dir = Path(folder, "out")
        out_dir.mkdir()
        for file, content in before.items():
            (out_dir / file).write_bytes(content)
        options = dict(
            files=files, out_dir=str(out_dir), tokenizer="bytes", num_proc=1, val_fraction=0.5, shard_tokens=100
        )
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                fineweb.prepare(DataConfig(**options))
        except UserError as error:
            assert folder in check_line(error)
            return
        after = {path.name: path.read_bytes() for path in out_dir.iterdir()}
        if name == "meta.json" and after == before:  # complete, and left as it is
            return
        shards = {file: content for file, content in finished.items() if file.endswith(".bin")}
        assert {file: content for file, content in after.items() if file.endswith(".bin")} == shards
        meta = json.loads(after["meta.json"])  # perhaps the shards were made again, as meta.json said there were others
        assert all(meta[key] == value for key, value in json.loads(finished["meta.json"]).items() if key != "settings")


# Tokenizer files


@functools.cache
def own_tokenizer():
    hf = tokenizers.ByteLevelBPETokenizer()
    hf.train_from_iterator(TEXTS * 3, vocab_size=290, special_tokens=["<|endoftext|>", "<pad>"], show_progress=False)
    data = json.loads(hf.to_str())
    data["pre_tokenizer"]["add_prefix_space"] = False
    return data


@functools.cache
def tokenizer_places():
    """Fewer of the vocabulary's places than there are, so that the others have their turn."""
    places = paths_of(own_tokenizer())
    vocab = [place for place in places if place[:2] == ("model", "vocab") or place[:2] == ("model", "merges")]
    return [place for place in places if place not in vocab] + vocab[::7]


@st.composite
def tokenizer_files(draw):
    data, what = (
        own_tokenizer(),
        draw(st.sampled_from(["value"] * 6 + ["ids", "merges", "whole", "cut", "noise", "other"])),
    )
    if what == "value":
        values = [
            *WRONG,
            0,
            5,
            289,
            290,
            70_000,
            2**31,
            2**32,
            2**64,
            10**30,
            "<|endoftext|>",
            "BPE",
            "a",
            "a b",
            "Ġ",
            ["a", "b"],
        ]
        data = changed(draw, data, tokenizer_places(), values)
    elif what in ("ids", "merges"):
        data = json.loads(json.dumps(data))
        vocab, merges = data["model"]["vocab"], data["model"]["merges"]
        a, b = (draw(st.sampled_from(sorted(vocab))) for _ in "ab")
        if what == "ids":
            vocab[a], vocab[b] = vocab[b], vocab[a]
        else:  # one more token, as if it had been learned last
            merges.append(draw(st.sampled_from([f"{a} {b}", [a, b]])))
            vocab[a + b] = 1 + max(vocab.values())
    text = json.dumps(data)
    if what == "cut":
        text = text[: draw(st.integers(0, len(text)))]
    elif what == "other":
        text = json.dumps(draw(JSON))
    return draw(st.binary(max_size=30)) if what == "noise" else text.encode()


@cases(40, 1000)
@given(data=tokenizer_files())
def test_tokenizer_files(data):
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "own.json")
        path.write_bytes(data)
        try:
            enc = get_tokenizer(str(path))
        except UserError as error:
            assert str(path) in check_line(error)
            return
    content = json.loads(data)
    content |= {"truncation": None, "padding": None, "post_processor": None, "decoder": None}  # what is no encoding
    content["model"] = {"vocab": content["model"]["vocab"], "merges": content["model"]["merges"], "type": "BPE"}
    try:
        hf = tokenizers.Tokenizer.from_str(json.dumps(content))
    except Exception:  # which wants fields that say nothing about the encoding
        return
    for text in TEXTS:
        ids = enc.encode_ordinary(text)
        assert enc.decode(ids) == text
        if "<" not in text:  # no added token
            assert ids == hf.encode(text).ids


# Models


@pytest.fixture(scope="module")
def models(data_dir, tmp_path_factory):
    """A function (hypothesis prints arguments): the folder of a run, {name: bytes} of it as Hugging Face's, and the
    same with weights in parts."""
    folder = tmp_path_factory.mktemp("models")
    flags = [*TRAIN, f"--data_dir={data_dir}", f"--out_dir={folder / 'run'}", "--max_steps=1", "--val_interval=0"]
    assert call("train_gpt2.py", *flags, "--n_embd=8").returncode == 0
    assert call("huggingface.py", f"--model={folder / 'run'}", f"--out_dir={folder / 'hf'}").returncode == 0
    files = {path.name: path.read_bytes() for path in (folder / "hf").iterdir()}
    tensors = safetensors.torch.load(files["model.safetensors"])
    parts = dict.fromkeys(tensors, "part-1.safetensors") | dict.fromkeys(list(tensors)[::2], "part-2.safetensors")
    older = {name: data for name, data in files.items() if name != "model.safetensors"}
    older["model.safetensors.index.json"] = json.dumps({"metadata": {}, "weight_map": parts}).encode()
    for part in set(parts.values()):
        older[part] = safetensors.torch.save({name: tensors[name] for name in tensors if parts[name] == part})
    return lambda: (folder / "run", [files, older], flags)


SMALL = [0, 1, 2, 8, 257, "gpt2", "../x", "/dev/zero"]
SIZES = [*WRONG, *SMALL, 2**31, 2**60, 2**63, 10**400, 1e300]


@cases(60, 3000)
@given(data=st.data())
def test_folders_of_hugging_face(models, data):
    """A folder with one odd thing in it loads, or is refused in one line that names it; what loads computes."""
    files = dict(data.draw(st.sampled_from(models()[1])))
    name = data.draw(st.sampled_from(["config.json"] * 4 + sorted(files)))
    how = data.draw(st.sampled_from(["value", "value", "value", "spoiled", "other", "deep", "digits"]))
    if how == "value" and name.endswith(".json"):
        content = json.loads(files[name])
        places = [place for place in paths_of(content) if len(place) < 3]  # not every token
        odd = [*WRONG, *SMALL] if name == "config.json" else SIZES  # transformers begins to build 2^31 layers
        files[name] = json.dumps(changed(data.draw, content, places, odd)).encode()
    elif how in ("value", "spoiled"):
        files[name] = data.draw(spoiled(st.just(files[name])))
    else:
        other = json.dumps(data.draw(JSON)).encode()
        files[name] = {"other": other, "deep": b"[" * 100_000, "digits": b'{"a": ' + b"9" * 5000 + b"}"}[how]
    with tempfile.TemporaryDirectory() as folder:
        for file, content in files.items():
            Path(folder, file).write_bytes(content)
        try:
            with contextlib.redirect_stderr(io.StringIO()) as err:
                model, tokenizer, _ = load_model(folder, torch.device("cpu"))
        except UserError as error:
            assert folder in check_line(error)
            return
        assert err.getvalue().count("\n") == (1 if "counts as unknown" in err.getvalue() else 0)
        assert model(torch.zeros(1, 3, dtype=torch.int64)).shape == (1, 3, model.config.vocab_size)
        assert tokenizer is None or get_tokenizer(tokenizer)


def places_of(data, path=()):
    """The places in a checkpoint's nested state, but for those of its data's fingerprints and its run's config."""
    if path in (("data",), ("config",)):
        return [path]
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else []
    return [path, *(inner for key, value in items for inner in places_of(value, (*path, key)))]


ODD = [*SIZES, 1j, (1,), torch.zeros(()), torch.zeros(1), torch.zeros(3, 3).to_sparse(), torch.zeros(2, device="meta")]


@cases(40, 1500)
@given(data=st.data())
def test_crafted_checkpoints(models, data):
    """It speaks and goes on, or is refused in one line that names it. (What kills the process fails too.)"""
    run_folder, _, flags = models()
    state = torch.load(run_folder / "ckpt_000001.pt", weights_only=True)
    *path, last = data.draw(st.sampled_from([place for place in places_of(state) if place]))
    inner = functools.reduce(lambda inner, key: inner[key], path, state)
    if data.draw(st.booleans()):
        inner[last] = data.draw(st.sampled_from(ODD))
    else:
        del inner[last]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "ckpt_000001.pt")
        torch.save(state, file)
        resume = [*flags, f"--out_dir={folder}", "--resume=True", "--max_steps=2"]
        speak = [f"--model={file}", "--max_new_tokens=2", "--device=cpu"]
        for script, more in (("sample.py", speak), ("train_gpt2.py", resume)):
            done = call(script, *more)
            *_, line = done.stderr.splitlines() or [""]
            assert done.returncode in (0, 2), done
            assert line.startswith("error: ") == (done.returncode == 2), done.stderr
            assert done.returncode == 0 or folder in line, line


# Records of a run


@cases(2, 200)
@given(data=st.data())
def test_metrics_files(data):
    about = {"tokenizer": "bytes", "train_tokens": 90, "val_tokens": 9, "val_bytes": 8, "settings": {"dataset": "x"}}
    run = {"kind": "run", "parameters": 5, "max_steps": 2, "config": {"val_tokens": 9, "seed": 1}, "data": about}
    train = [{"kind": "train", "step": step, "loss": 3.5, "lr": 1e-3, "mfu": None} for step in (1, 2)]
    train[1] |= {"mean_loss": 3.5, "tokens": 64, "seconds": 2.0, "epoch": 0.1, "tokens_per_sec": 32.0, "dt": 1.0}
    records = [run, *train, {"kind": "val", "step": 2, "val_loss": 3.0}, {"kind": "event", "event": "done"}]
    records += [
        {"kind": "sample", "step": 2, "text": "x"},
        {"kind": "hellaswag", "step": 2, "acc": 0.2, "acc_norm": 0.3},
    ]
    records += [{"kind": "event", "event": "resume", "step": 2, "changed": {"max_steps": [2, 3]}}]
    values = [*WRONG, 0, 10**30, 1e300, "train", "val", "nothing"]
    if data.draw(st.booleans()):
        records = changed(data.draw, records, paths_of(records), values)
    content = st.just("".join(json.dumps(record) + "\n" for record in records).encode())
    with tempfile.TemporaryDirectory() as name:
        Path(name, "metrics.jsonl").write_bytes(data.draw(content | spoiled(content)))
        done = call("report.py", name, "--dpi=10")
        *left_out, last = done.stderr.splitlines() or [""]
        assert last.startswith("error: ") == (done.returncode == 2) == (done.returncode != 0)
        assert all("skipped" in line for line in left_out)
        assert (Path(name, "loss.png").exists(), Path(name, "report.md").exists()) == (done.returncode == 0,) * 2


# Processes


@cases(2, 100)
@given(data=st.data())
def test_processes(data):
    script = data.draw(st.sampled_from(["fineweb.py", "report.py"] + ["train_gpt2.py", "sample.py"] * FULL))  # faster
    argv = [arg for arg in data.draw(arguments(script, most=3)) if "tokenizer" not in arg]
    last = {
        "fineweb.py": ["--files=nothere/*"],
        "train_gpt2.py": ["--data_dir=nothere"],
        "sample.py": ["--model=nothere"],
    }
    check_refused(run(script, *argv, *last.get(script, ["nothere"])))


@pytest.mark.skipif(not FULL, reason="ten seconds each")
@cases(1, 5)
@given(argv=arguments("train_gpt2.py", most=3))
def test_processes_under_torchrun(argv):
    done = run("train_gpt2.py", *argv, "--data_dir=nothere", processes=2)
    assert done.returncode == (0 if "--help" in argv or "-h" in argv else 1)  # which torchrun makes of a 2
    assert [line[:7] for line in done.stderr.splitlines()].count("error: ") == done.returncode
    assert done.stderr.count("Traceback") <= done.returncode  # torchrun's own
