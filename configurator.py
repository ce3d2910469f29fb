"""Config files and flags to checked dataclasses. Standard library only.

    python train_gpt2.py config/gpt2_124m.py --batch_size=32 --compile=False

Config files are Python assignments; they are read in order, then the flags: a later value wins. Every name and type is
checked against the dataclass annotations, and a mistake is one line that says what, where and what to do.
"""

import ast
import difflib
import inspect
import io
import math
import os
import re
import signal
import sys
import time
import tokenize
import traceback
import types
import typing
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO, Union

PathStr = Annotated[str, "a path"]  # an option of this type may begin with ~/
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun tells a process


class UserError(Exception):
    """A mistake of the user's, in one line: what is wrong, where, and what to do. `cli` makes it exit status 2.

    `alone`: of several processes only this one knows (as a rule all of them raise the same).
    """

    def __init__(self, message: str, alone: bool = False):
        super().__init__(" ".join(message.splitlines()))  # one line, whatever it quotes
        self.alone = alone


class Output:
    """stdout or stderr, whose failures end no run: what a closed pipe or a full disk does not take is lost.

    Characters that the terminal's encoding does not have are replaced.
    """

    def __init__(self, stream: TextIO | None):
        self.stream, self.lost = stream, stream is None  # None: closed before Python started
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")

    def write(self, text: str) -> int:
        self.attempt("write", text)
        return len(text)

    def flush(self) -> None:
        self.attempt("flush")

    def attempt(self, method: str, *args: str) -> None:
        try:
            if not self.lost:
                getattr(self.stream, method)(*args)
        except OSError as error:
            self.lost = True
            if not isinstance(error, BrokenPipeError) and self is sys.stdout:  # `| head` wants no more, and knows it
                print(f"stdout: {error.strerror}; what is printed from here on is lost", file=sys.stderr, flush=True)

    def __getattr__(self, name: str) -> Any:  # isatty, fileno, encoding, ...
        return getattr(self.stream, name)


def cli(main: Callable[[], int | None]) -> typing.NoReturn:
    """Run a script's `main` and exit with what it returns; a UserError becomes one line on stderr and status 2."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the scripts switch it off while they import
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
    try:
        status = main() or 0
    except UserError as error:
        if error.alone or not under_torchrun() or os.environ["LOCAL_RANK"] == "0":  # one process of each machine
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(10)  # torchrun kills all once one ends, and the one that says it must come to that
        status = 2
    except KeyboardInterrupt:
        status = 130  # as a shell calls it
    except Exception as error:
        if is_out_of_memory(error):
            wanted = re.search(r"ried to allocate ([\d.]+ ?\w+)", str(error))
            more = f" ({wanted[1]} more were wanted)" if wanted else ""
            print(f"error: out of memory{more}; use smaller batches, or a smaller model", file=sys.stderr, flush=True)
            status = 2
        elif under_torchrun():
            traceback.print_exc()
            status = 1
        else:
            raise
    if under_torchrun():  # gloo's threads outlive its group and now and then abort a Python that winds up
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def under_torchrun() -> bool:
    """Whether this process is one of a group that torchrun started (or who else sets all that torchrun does)."""
    return all(name in os.environ for name in TORCHRUN)


def is_out_of_memory(error: Exception) -> bool:
    """Whether it is what Python or torch raise for want of memory, on a card or on the CPU."""
    names = [cls.__name__ for cls in type(error).__mro__]
    return "OutOfMemoryError" in names or "MemoryError" in names or "can't allocate memory" in str(error)


def configure(*classes: type, argv: list[str] | None = None) -> tuple:
    """Fill dataclasses from the command line (default: sys.argv).

    ['config/a.py', '--lr=1e-3'], (A, B) -> (A(...), B(...), {'lr': '--lr', ...}): the instances, then a dict of every
    name that was set to where it was set, for rules that depend on what the user asked for. The classes share one flat
    namespace of names. `--help` prints all options and exits. Raises UserError.
    """
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        if not under_torchrun() or os.environ["RANK"] == "0":
            print(help_text(classes))
        sys.exit(0)
    annotations = {name: hint for cls in classes for name, hint in typing.get_type_hints(cls).items()}
    extras = {name: hint for cls in classes for name, hint in typing.get_type_hints(cls, include_extras=True).items()}
    paths = {name for name, hint in extras.items() if PathStr in (hint, *typing.get_args(hint))}
    values: dict[str, Any] = {}
    given: dict[str, str] = {}
    files = [arg for arg in argv if not arg.startswith("-")]
    flags = [arg for arg in argv if arg.startswith("-")]
    for path in files:
        for name, value, where in read_file(path, annotations):
            values[name], given[name] = check(name, value, annotations, where), where
    for flag in flags:
        name, equals, text = flag.removeprefix("--").partition("=")
        if not flag.startswith("--") or not name.isidentifier():
            raise UserError(f"{flag}: options look like --name=value{nearest(name.replace('-', '_'), annotations)}")
        if name in annotations and not equals:
            raise UserError(f"--{name} needs a value: --{name}={'True' if annotations[name] is bool else 'VALUE'}")
        given[name] = f"--{name}"
        values[name] = check(name, parse(text, annotations.get(name)), annotations, given[name])
    values |= {name: os.path.expanduser(value) for name, value in values.items() if name in paths and value}
    instances = []
    for cls in classes:
        own = {name: values[name] for name in typing.get_type_hints(cls) if name in values}
        try:
            instances.append(cls(**own))
        except ValueError as error:  # a rule across fields, from __post_init__
            sources = dict.fromkeys(given[name] for name in own if re.search(rf"\b{name}\b", str(error)))
            raise UserError(f"{', '.join(sources)}: {error}" if sources else str(error)) from None
    return *instances, given


def read_file(path: str, known: Collection[str]) -> list[tuple[str, Any, str]]:
    """Execute a config file -> [(name, value, 'file:line')] of its public names; of imported ones only those known."""
    if not path.endswith(".py"):
        path = path or "''"
        raise UserError(f"{path}: not a config file (.py), and options look like --name=value")
    try:
        source = Path(path).read_bytes()
    except OSError as error:
        others = [str(p) for p in Path(path).parent.glob("*.py")]
        raise UserError(f"{path}: {error.strerror}{nearest(path, others)}") from None
    namespace: dict[str, Any] = {"__file__": path, "__name__": "config"}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # Python warns of what it may have misread, as an unknown escape in a string
            tree = ast.parse(source, path)
            code = compile(tree, path, "exec")
        exec(code, namespace)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever the file's own code raises, SystemExit too
        frames = [f.tb_lineno for f in _frames(error.__traceback__) if f.tb_frame.f_code.co_filename == path]
        line = error.lineno if isinstance(error, SyntaxError) and error.filename == path else None
        line = line or (frames[-1] if frames else 1)
        raise UserError(f"{path}:{line}: {traceback.format_exception_only(error)[-1]}") from None
    lines: dict[str, int] = {}
    imported = set()
    for node in ast.walk(tree):
        match node:
            case ast.alias():
                name = (node.asname or node.name).split(".")[0]
                imported.add(name)
            case ast.Name(id=name, ctx=ast.Store()) | ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                pass
            case _:
                continue
        lines[name] = max(node.lineno, lines.get(name, 1))
    return [
        (name, value, f"{path}:{lines.get(name, 1)}")
        for name, value in namespace.items()
        if not name.startswith("_") and (name not in imported or name in known)
    ]


def _frames(tb: types.TracebackType | None) -> typing.Iterator[types.TracebackType]:
    while tb:
        yield tb
        tb = tb.tb_next


def parse(text: str, hint: Any) -> Any:
    """A command line value: a Python literal, true/false/none in any case, else the string itself."""
    words = {"true": True, "false": False, "none": None}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # '\\d' is two characters, whatever Python thinks of it
            value = words[text.lower()] if text.lower() in words else ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text
    # A folder may be called 2024: where a string is wanted and the literal is none, the text is the value.
    return value if _fits(value, hint) or not _fits(text, hint) else text


def check(name: str, value: Any, annotations: dict[str, Any], where: str) -> Any:
    """The value as its annotation wants it (1 -> 1.0 for a float, 1e4 -> 10000 for an int), or a UserError."""
    if name not in annotations:
        raise UserError(f"{where}: unknown option {name!r}{nearest(name, annotations)}")
    hint = annotations[name]
    options = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
    if isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):  # what no file name or text can hold
        raise UserError(f"{where}: {name} = {_show(value)} has a NUL or is not Unicode text")
    exact = type(value) is float and abs(value) < 2**53  # above it a float is no longer one whole number
    if int in options and float not in options and exact and value.is_integer():
        return int(value)
    if _fits(value, hint):
        return float(value) if type(value) is int and float in options else value
    literals = [str(x) for option in options if typing.get_origin(option) is Literal for x in typing.get_args(option)]
    near = nearest(value, literals) if isinstance(value, str) else ""
    raise UserError(f"{where}: {name} = {_show(value)}, but it must be {_spell(hint)}{near}")


def _show(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:  # an int of more than 4,300 digits, an object of a config file's own class
        return f"a {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:100]}..."


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if origin is Literal:
        return any(type(value) is type(x) and value == x for x in typing.get_args(hint))
    if hint is type(None):
        return value is None
    if hint in (int, float) and type(value) is int:
        return -(2**63) <= value < 2**63
    return type(value) is hint and (hint is not float or math.isfinite(value))


def _spell(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_spell(option) for option in typing.get_args(hint))
    if origin is Literal:
        return " or ".join(repr(x) for x in typing.get_args(hint))
    names = {
        int: "a whole number (64 bits)",
        float: "a finite number",
        bool: "True or False",
        str: "a string",
        type(None): "None",
    }
    return names[hint]


def nearest(word: str, known: typing.Iterable[str]) -> str:
    """'; did you mean X?' for the closest of the known words, or ''."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]}?" if match else ""


def help_text(classes: typing.Iterable[type]) -> str:
    """Every option with its default and its comment from the dataclass source."""
    first = (sys.modules["__main__"].__doc__ or "").strip()
    lines = [first, "", f"usage: python {os.path.basename(sys.argv[0])} [config/file.py ...] [--name=value ...]"]
    for cls in classes:
        comments = field_comments(cls)
        lines += ["", f"{cls.__name__}:"]
        for name, hint in typing.get_type_hints(cls).items():
            default = f"--{name}={cls.__dataclass_fields__[name].default}"
            about = [_spell(hint)] if "Literal" in str(hint) else []
            about += [comments[name]] if name in comments else []
            lines.append(f"  {default:<36} {'; '.join(about)}".rstrip())
    return "\n".join(lines)


def field_comments(cls: type) -> dict[str, str]:
    """{field: the comment behind it in the class's source}."""
    comments = {}
    for token in tokenize.generate_tokens(io.StringIO(inspect.getsource(cls)).readline):
        field = re.match(r"\s+(\w+):", token.line)
        if token.type == tokenize.COMMENT and field:
            comments[field[1]] = token.string.lstrip("# ")
    return comments
