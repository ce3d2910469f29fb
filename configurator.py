"""Config files and flags to checked dataclasses. Standard library only.

    python train_gpt2.py config/gpt2_124m.py --batch_size=32 --compile=False

Config files are Python assignments. They run in order, then the flags: a later value wins. Every name and type is
checked against the dataclasses, and a mistake is one line that says what, where and what to do.
"""

import ast
import difflib
import inspect
import os
import re
import signal
import sys
import time
import traceback
import types
import typing
from collections.abc import Callable, Collection
from pathlib import Path
from typing import IO, Annotated, Any, Literal

PathStr = Annotated[str, "a path"]  # an option of this type may begin with ~/
ALIASES = {  # what nanoGPT calls an option, and what it is called here
    "lr": "learning_rate", "max_iters": "max_steps", "warmup_iters": "warmup_steps", "eval_interval": "val_interval",
    "eval_iters": "val_tokens", "gradient_accumulation_steps": "total_batch_size", "dataset": "data_dir",
}  # fmt: skip
LESS_MEMORY = "use a smaller --batch_size, or in training --activation_checkpointing=True --chunked_loss=True"


TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun tells a process


class UserError(Exception):
    """The user's mistake, in one line: what is wrong, where, and what to do. `cli` turns it into exit status 2.

    `alone`: only this process raises it. As a rule all processes raise the same, and one of them prints it.
    """

    def __init__(self, message: str, alone: bool = False):
        super().__init__(" ".join(message.splitlines()))
        self.alone = alone


def configure(*classes: type, argv: list[str] | None = None, positional: str | None = None) -> tuple:
    """Fill dataclasses, which share one namespace of names, from the command line (default: sys.argv). What is neither
    a flag nor a config file (.py) is the value of the option `positional`. Raises UserError.

    ['config/a.py', '--lr=1e-3'], (A, B) -> (A(...), B(...), {'lr': '--lr', ...}): and where each name was set.
    """
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(help_text(classes, positional))
        sys.exit(0)
    hints = {name: hint for cls in classes for name, hint in hints_of(cls).items()}
    values, given = {}, {}
    for arg in sorted(argv, key=lambda arg: arg.startswith("-")):  # files first
        if positional and not arg.startswith("-") and not arg.endswith(".py"):
            settings = [(positional, arg, arg)]
        else:
            settings = [read_flag(arg, hints)] if arg.startswith("-") else read_file(arg, hints)
        for name, value, where in settings:
            values[name], given[name] = check(name, value, hints, where), where
    instances = []
    for cls in classes:
        own = {name: values[name] for name in hints_of(cls) if name in values}
        try:
            instances.append(cls(**own))
        except ValueError as error:  # a rule across options, from __post_init__
            where = [given[name] for name in own if re.search(rf"\b{name}\b", str(error))]
            raise UserError(f"{', '.join(dict.fromkeys(where))}: {error}" if where else str(error)) from None
    return *instances, given


def hints_of(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)  # with PathStr, which is a plain str otherwise


def read_file(path: str, known: Collection[str]) -> list[tuple[str, Any, str]]:
    """Execute a config file -> [(name, value, 'file:line')] of its public names, and of options that it imports."""
    if not path.endswith(".py"):
        raise UserError(f"{path}: not a config file (.py), and options look like --name=value")
    namespace: dict[str, Any] = {"__file__": path, "__name__": "config"}
    try:
        tree = ast.parse(Path(path).read_bytes(), path)
        exec(compile(tree, path, "exec"), namespace)
    except FileNotFoundError as error:
        others = [str(other) for other in Path(path).parent.glob("*.py")]
        raise UserError(f"{path}: {error.strerror}{nearest(path, others)}") from None
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        line = getattr(error, "lineno", None) or [1, *lines][-1]
        raise UserError(f"{path}:{line}: {traceback.format_exception_only(error)[-1]}") from None
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    lines = {node.id: f"{path}:{node.lineno}" for node in sorted(names, key=lambda node: node.lineno)}
    public = [name for name in namespace if name in known or (name in lines and not name.startswith("_"))]
    return [(name, namespace[name], lines.get(name, path)) for name in public]


def read_flag(flag: str, hints: dict[str, Any]) -> tuple[str, Any, str]:
    """'--lr=1e-3' -> ('lr', 0.001, '--lr'): a Python literal, true, false or none in any case, or else the text."""
    name, equals, text = flag.removeprefix("--").partition("=")
    if not (flag.startswith("--") and equals):
        raise UserError(f"{flag}: options look like --name=value{nearest(name.strip('-'), hints)}")
    try:
        value = ast.literal_eval(text.capitalize() if text.lower() in ("true", "false", "none") else text)
    except Exception:
        value = text
    kinds = kinds_of(hints.get(name))  # a folder may be called 2024: where a string is wanted, that is the value
    return name, text if fits(text, kinds) and not fits(value, kinds) else value, f"--{name}"


def check(name: str, value: Any, hints: dict[str, Any], where: str) -> Any:
    """The value as its annotation wants it (1 -> 1.0 for a float, 1e4 -> 10000 for an int), or a UserError."""
    if name not in hints:
        raise UserError(f"{where}: unknown option {name!r}{nearest(name, hints)}")
    kinds = kinds_of(hints[name])
    if type(value) is int and float in kinds and int not in kinds:
        value = float(value)
    if type(value) is float and value.is_integer() and int in kinds and float not in kinds:
        value = int(value)
    if not fits(value, kinds):
        wanted = [kind.__name__.removesuffix("Type") if isinstance(kind, type) else repr(kind) for kind in kinds]
        near = nearest(value, [kind for kind in kinds if isinstance(kind, str)]) if isinstance(value, str) else ""
        raise UserError(f"{where}: {name} = {value!r}, but it must be {' or '.join(wanted)}{near}")
    return os.path.expanduser(value) if isinstance(value, str) and "a path" in str(hints[name]) else value


def kinds_of(hint: Any) -> list:
    """The types and the words that an option may have: Literal['a', 'b'] | None -> ['a', 'b', NoneType]."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [kind for part in typing.get_args(hint) for kind in kinds_of(part)]
    return list(typing.get_args(hint)) if typing.get_origin(hint) is Literal else [str if hint is PathStr else hint]


def fits(value: Any, kinds: list) -> bool:
    finite = type(value) is not float or abs(value) < float("inf")  # NaN is not, either
    return finite and any(type(value) is kind if isinstance(kind, type) else value == kind for kind in kinds)


def at_least(instance: Any, least: float, *names: str) -> None:
    """A rule for __post_init__: raises ValueError where one of these options is below `least`; None is not."""
    for name in names:
        value = getattr(instance, name)
        if value is not None and value < least:
            raise ValueError(f"{name} = {value}, but it must be at least {least}")


def within(instance: Any, least: float, most: float, *names: str) -> None:
    """A rule for __post_init__: raises ValueError where one of these options is outside least..most; None is not."""
    for name in names:
        value = getattr(instance, name)
        if value is not None and not least <= value <= most:
            raise ValueError(f"{name} = {value}, but it must be {least} to {most}")


def nearest(word: str, known: Collection[str]) -> str:
    """'; did you mean X?' for the closest of the known words, or one that means the same; or ''."""
    alias = ALIASES.get(word)
    matches = [alias] if alias in known else difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]}?" if matches else ""


def help_text(classes: Collection[type], positional: str | None = None) -> str:
    """Every option with its default, its choices and the comment behind it in the dataclass's source."""
    script = os.path.basename(sys.argv[0]) + (f" [{positional.upper()}]" if positional else "")
    lines = [(sys.modules["__main__"].__doc__ or "").strip(), ""]
    lines += [f"usage: python {script} [config/file.py ...] [--name=value ...]"]
    for cls in [part for whole in classes for part in whole.__mro__[:-1]]:  # what it inherits comes behind its own
        comments = dict(re.findall(r"^ +(\w+): .*?  # (.*)$", inspect.getsource(cls), re.MULTILINE))
        lines += ["", f"{cls.__name__}:"]
        for name in inspect.get_annotations(cls):
            default = f"--{name}={cls.__dataclass_fields__[name].default}"
            choices = " or ".join(repr(kind) for kind in kinds_of(hints_of(cls)[name]) if isinstance(kind, str))
            lines += [f"  {default:<36} {choices}{'; ' * bool(choices)}{comments.get(name, '')}".rstrip(" ;")]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# The frame of every script


def cli(main: Callable[[], int | None]) -> typing.NoReturn:
    """Run a script's `main` and exit with what it returns; a UserError becomes one line on stderr and status 2."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the scripts switch it off while they import
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
    try:
        status = main() or 0
    except UserError as error:
        if not error.alone and os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(10)  # torchrun kills all processes once one ends; local rank 0 needs time to print
        else:
            print(f"error: {error}", file=sys.stderr, flush=True)
        status = 2
    except KeyboardInterrupt:
        status = 130  # as a shell calls it
    except Exception as error:
        memory = out_of_memory(error)
        if not memory and not under_torchrun():
            raise
        print(f"error: {memory}; {LESS_MEMORY}" if memory else traceback.format_exc(), file=sys.stderr, flush=True)
        status = 2 if memory else 1
    if under_torchrun():  # skip Python's shutdown, which gloo's threads sometimes abort
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


def under_torchrun() -> bool:
    """Whether torchrun, or something that sets the same variables, started this process as one of a group."""
    return all(name in os.environ for name in TORCHRUN)


class Output:
    """stdout or stderr: once it fails (a closed pipe, a full disk, a lost terminal), what is printed goes nowhere."""

    def __init__(self, stream: IO | None):
        self.stream = stream or open(os.devnull, "w")  # noqa: SIM115 (None: closed before Python started)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # characters that the terminal's encoding lacks

    def write(self, text: str) -> int:
        return self.attempt("write", text)

    def flush(self) -> None:
        self.attempt("flush")

    def attempt(self, method: str, *args: str) -> Any:
        try:
            return getattr(self.stream, method)(*args)
        except OSError:
            self.stream = open(os.devnull, "w")  # noqa: SIM115

    def __getattr__(self, name: str) -> Any:  # fileno, isatty, encoding, ...
        return getattr(self.stream, name)


def is_out_of_memory(error: Exception) -> bool:
    """Whether Python or torch raised it because memory ran out, on a GPU or on the CPU."""
    names = {cls.__name__ for cls in type(error).__mro__}
    return bool(names & {"OutOfMemoryError", "MemoryError"}) or "DefaultCPUAllocator" in str(error)


def out_of_memory(error: Exception) -> str | None:
    """'out of memory (2.00 GiB more were wanted)' where Python or torch raised it for that, on a GPU or a CPU."""
    if not is_out_of_memory(error):
        return None
    wanted = re.search(r"ried to allocate ([\d.]+ ?\w+)", str(error))
    return "out of memory" + (f" ({wanted[1]} more were wanted)" if wanted else "")
