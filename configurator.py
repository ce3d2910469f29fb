"""Config files and flags to checked dataclasses. Standard library only.

    python train_gpt2.py config/gpt2_124m.py --batch_size=32 --compile=False

Config files are Python assignments. They run in order, then the flags: a later value wins. Every name and type is
checked against the dataclasses, and a mistake is one line that says what, where and what to do.
"""

import ast
import contextlib
import difflib
import inspect
import io
import json
import math
import os
import re
import signal
import sys
import time
import traceback
import types
import typing
from collections.abc import Callable, Collection
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

PathStr = Annotated[str, "a path"]  # an option of this type may begin with ~/
ALIASES = {  # what nanoGPT, llm.c or Hugging Face call an option, and what it is called here
    "lr": "learning_rate", "max_lr": "learning_rate", "iters": "max_steps", "max_iters": "max_steps",
    "warmup_iters": "warmup_steps", "bs": "batch_size", "micro_batch_size": "batch_size",
    "gradient_accumulation_steps": "total_batch_size", "context_length": "block_size", "d_model": "n_embd",
    "hidden_size": "n_embd", "layers": "n_layer", "heads": "n_head", "dataset": "data_dir", "data": "data_dir",
    "eval_interval": "val_interval", "eval_iters": "val_tokens", "wandb_log": "log_to", "checkpoint": "model",
    "prompt": "start", "max_tokens": "max_new_tokens",
}  # fmt: skip
CONTROLS = {i: f"\\x{i:02x}" for i in (*range(32), *range(127, 160)) if chr(i) not in "\n\t"}
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun tells a process


class UserError(Exception):
    """The user's mistake, in one line: what is wrong, where, and what to do. `cli` turns it into exit status 2.

    `alone`: only this process raises it. As a rule all processes raise the same, and one of them prints it.
    """

    def __init__(self, message: str, alone: bool = False):
        super().__init__(" ".join(message.splitlines()))  # one line, whatever it quotes
        self.alone = alone


class Output:
    """stdout or stderr, whose failure ends no run: what a closed pipe or a full disk refuses is lost.

    Characters that the terminal's encoding lacks are replaced; on a terminal control characters are written as escapes:
    a model's text shall not steer it.
    """

    def __init__(self, stream: TextIO | None, escapes: bool = False):
        self.stream, self.lost = stream, stream is None  # None: closed before Python started
        self.table = CONTROLS if escapes and self.isatty() else {}
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")

    def write(self, text: str) -> int:
        self.attempt("write", text.translate(self.table))
        return len(text)

    def flush(self) -> None:
        self.attempt("flush")

    def isatty(self) -> bool:
        return not self.lost and self.stream.isatty()

    def attempt(self, method: str, *args: str) -> None:
        try:
            if not self.lost:
                getattr(self.stream, method)(*args)
        except OSError as error:
            self.lost = True
            if not isinstance(error, BrokenPipeError) and self is sys.stdout:  # `| head` knows that it has enough
                print(f"stdout: {error.strerror}; what is printed from here on is lost", file=sys.stderr, flush=True)

    def __getattr__(self, name: str) -> Any:  # fileno, encoding, ...
        return getattr(self.stream, name)


def cli(main: Callable[[], int | None]) -> typing.NoReturn:
    """Run a script's `main` and exit with what it returns; a UserError becomes one line on stderr and status 2."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the scripts switch it off while they import
    sys.stdout, sys.stderr = Output(sys.stdout, escapes=True), Output(sys.stderr)  # progress bars steer stderr
    try:
        status = main() or 0
    except UserError as error:
        if error.alone or not under_torchrun() or os.environ["LOCAL_RANK"] == "0":  # one process of each machine
            tell(f"error: {error}")
        else:
            time.sleep(10)  # torchrun kills all processes once one ends; local rank 0 needs time to print
        status = 2
    except KeyboardInterrupt:
        status = 130  # as a shell calls it
    except Exception as error:
        if is_out_of_memory(error):
            tell(f"error: {out_of_memory(error)}; use smaller batches, or a smaller model")
            status = 2
        elif under_torchrun():
            tell(traceback.format_exc())
            status = 1
        else:
            raise
    if under_torchrun():  # skip Python's shutdown, which gloo's threads sometimes abort
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def tell(text: str) -> None:
    """Why this process ends: on stderr, and in torchrun's error file, which torchrun shows at its very end: its own
    traceback pushes what is on stderr off the screen."""
    print(text, file=sys.stderr, flush=True)
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        content = {"message": {"message": text, "extraInfo": {"timestamp": str(int(time.time()))}}}
        with contextlib.suppress(OSError):  # a full disk: stderr has it already
            Path(path).write_text(json.dumps(content))


def under_torchrun() -> bool:
    """Whether torchrun, or something that sets the same variables, started this process as one of a group."""
    return all(name in os.environ for name in TORCHRUN)


def is_out_of_memory(error: Exception) -> bool:
    """Whether Python or torch raised it because memory ran out, on a GPU or on the CPU."""
    names = [cls.__name__ for cls in type(error).__mro__]
    texts = ("can't allocate memory", "not enough memory")  # of torch's allocator on the CPU
    return "OutOfMemoryError" in names or "MemoryError" in names or any(text in str(error) for text in texts)


def out_of_memory(error: Exception) -> str | None:
    """'out of memory (2.00 GiB more were wanted, of a card of 23.64 GiB)', as far as torch's words tell; else None."""
    if not is_out_of_memory(error):
        return None
    wanted = re.search(r"ried to allocate ([\d.]+ ?\w+)", str(error))
    card = re.search(r"total capacity of ([\d.]+ ?\w+)", str(error))
    of = f", of a card of {card[1]}" if card else ""
    return "out of memory" + (f" ({wanted[1]} more were wanted{of})" if wanted else "")


def configure(*classes: type, argv: list[str] | None = None, positional: str | None = None) -> tuple:
    """Fill dataclasses from the command line (default: sys.argv). What is neither a flag nor a config file (.py) is the
    value of the option `positional`.

    ['config/a.py', '--lr=1e-3'], (A, B) -> (A(...), B(...), {'lr': '--lr', ...}): the instances, then where each name
    was set, for rules that depend on what the user asked for. The classes share one flat namespace of names. `--help`
    prints all options and exits. Raises UserError.
    """
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        if not under_torchrun() or os.environ["RANK"] == "0":
            print(help_text(classes, positional))
        sys.exit(0)
    annotations = {name: hint for cls in classes for name, hint in options_of(cls).items()}
    flags = [read_flag(arg, annotations, after) for arg, after in pairwise([*argv, "-"]) if arg.startswith("-")]
    settings = []
    for arg in argv:
        if positional and not arg.startswith("-") and not arg.endswith(".py"):
            settings.append((positional, arg, arg))
        elif not arg.startswith("-"):
            settings += read_file(arg, annotations)
    settings += flags
    values, given = {}, {}
    for name, value, where in settings:
        values[name], given[name] = check(name, value, annotations, where), where
    instances = []
    for cls in classes:
        own = {name: values[name] for name in options_of(cls) if name in values}
        try:
            instances.append(cls(**own))
        except ValueError as error:  # a rule across fields, from __post_init__
            sources = dict.fromkeys(given[name] for name in own if re.search(rf"\b{name}\b", str(error)))
            raise UserError(f"{', '.join(sources)}: {error}" if sources else str(error)) from None
    return *instances, given


def options_of(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)  # with PathStr, which is a plain str otherwise


def read_file(path: str, known: Collection[str]) -> list[tuple[str, Any, str]]:
    """Execute a config file -> [(name, value, 'file:line')] of its public names, and of options that it imports."""
    if not path.endswith(".py"):
        raise UserError(f"{path}: not a config file (.py), and options look like --name=value")
    try:
        source = Path(path).read_bytes()
    except OSError as error:
        others = [str(p) for p in Path(path).parent.glob("*.py")]
        raise UserError(f"{path}: {error.strerror}{nearest(path, others)}") from None
    namespace: dict[str, Any] = {"__file__": path, "__name__": "config"}
    try:
        tree = ast.parse(source, path)
        exec(compile(tree, path, "exec"), namespace)
    except Exception as error:
        lines = [1, *(frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path)]
        line = error.lineno if isinstance(error, SyntaxError) and error.filename == path else lines[-1]
        raise UserError(f"{path}:{line}: {traceback.format_exception_only(error)[-1]}") from None
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    assigned = {node.id: node.lineno for node in sorted(names, key=lambda node: node.lineno)}
    return [
        (name, value, f"{path}:{assigned[name]}" if name in assigned else path)
        for name, value in namespace.items()
        if name in known or (name in assigned and not name.startswith("_"))
    ]


def read_flag(flag: str, annotations: dict[str, Any], after: str = "-") -> tuple[str, Any, str]:
    """'--lr=1e-3' -> ('lr', 0.001, '--lr'). `after` is the next argument, to mend '--lr 1e-3'."""
    name, equals, text = flag.removeprefix("--").partition("=")
    if name == "config" and name not in annotations:
        raise UserError(f"{flag}: a config file is named without a flag{': ' * bool(text)}{text}")
    if flag.startswith("--") and name.isidentifier() and equals:
        return name, parse(text, annotations.get(name)), f"--{name}"
    if not equals and not after.startswith("-") and not after.endswith(".py"):
        flag, text = f"{flag} {after}", after
    name = name.replace("-", "_")
    name = name if name in annotations else similar(name, annotations)
    text = text or ("True" if annotations.get(name) is bool else "VALUE")
    raise UserError(f"{flag}: options look like --name=value{f': --{name}={text}' if name else ''}")


def parse(text: str, hint: Any) -> Any:
    """A command line value: a Python literal, true/false/none in any case, else the string itself."""
    try:
        value = ast.literal_eval(text.capitalize() if text.lower() in ("true", "false", "none") else text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # all that it says it raises
        return text
    # A folder may be called 2024: where a string is wanted and the literal is none, the text is the value.
    return text if fits(text, hint) and not fits(value, hint) else value


def check(name: str, value: Any, annotations: dict[str, Any], where: str) -> Any:
    """The value as its annotation wants it (1 -> 1.0 for a float, 1e4 -> 10000 for an int), or a UserError."""
    if name not in annotations:
        raise UserError(f"{where}: unknown option {name!r}{nearest(name, annotations)}")
    kinds = kinds_of(annotations[name])
    if type(value) is float and value.is_integer() and int in kinds and float not in kinds:
        value = int(value)
    if not any(fits(value, kind) for kind in kinds):
        choices = [choice for kind in kinds if typing.get_origin(kind) is Literal for choice in typing.get_args(kind)]
        near = nearest(value, choices) if isinstance(value, str) else ""
        raise UserError(f"{where}: {name} = {value!r}, but it must be {spell(annotations[name])}{near}")
    if type(value) is int and float in kinds:
        return float(value)
    return os.path.expanduser(value) if type(value) is str and PathStr in kinds else value


def kinds_of(hint: Any) -> tuple:
    """The types of a union, or the one type."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def fits(value: Any, hint: Any) -> bool:
    if len(kinds_of(hint)) > 1:
        return any(fits(value, kind) for kind in kinds_of(hint))
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    if hint in (int, float) and type(value) is int:
        return -(2**63) <= value < 2**63  # what torch and NumPy hold
    if hint is float:
        return type(value) is float and math.isfinite(value)
    return type(value) is (str if hint is PathStr else hint)


def spell(hint: Any) -> str:
    """How an error calls a type."""
    if len(kinds_of(hint)) > 1:
        return " or ".join(map(spell, kinds_of(hint)))
    if typing.get_origin(hint) is Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    names = {int: "a whole number (64 bits)", float: "a finite number", bool: "True or False", type(None): "None"}
    return names.get(hint, "a string")


def at_least(instance: Any, least: float, *names: str) -> None:
    """A rule for __post_init__: raises ValueError where one of these fields is below `least`; None is not."""
    for name in names:
        value = getattr(instance, name)
        if value is not None and value < least:
            raise ValueError(f"{name} = {value}, but it must be at least {least}")


def similar(word: str, known: Collection[str]) -> str | None:
    """The closest of the known words, if one is close, or means the same."""
    alias = ALIASES.get(word.lower())
    return alias if alias in known else next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)), None)


def nearest(word: str, known: Collection[str]) -> str:
    """'; did you mean X?' for it, or ''."""
    match = similar(word, known)
    return f"; did you mean {match}?" if match else ""


def help_text(classes: typing.Iterable[type], positional: str | None = None) -> str:
    """Every option with its default, its choices and the comment behind it in the dataclass's source."""
    first = (sys.modules["__main__"].__doc__ or "").strip()
    script = os.path.basename(sys.argv[0]) + (f" [{positional.upper()}]" if positional else "")
    lines = [first, "", f"usage: python {script} [config/file.py ...] [--name=value ...]"]
    for cls in [part for whole in classes for part in whole.__mro__[:-1]]:  # what it inherits comes behind its own
        comments = dict(re.findall(r"^ +(\w+): .*?  # (.*)$", inspect.getsource(cls), re.MULTILINE))
        lines += ["", f"{cls.__name__}:"]
        for name in inspect.get_annotations(cls):
            hint = options_of(cls)[name]
            default = f"--{name}={cls.__dataclass_fields__[name].default}"
            choices = f"{spell(hint)}; " if "Literal" in str(hint) else ""
            lines.append(f"  {default:<36} {choices}{comments.get(name, '')}".rstrip(" ;"))
    return "\n".join(lines)
