"""Config files and flags to checked dataclasses. Standard library only.

    python train_gpt2.py config/gpt2_124m.py --batch_size=32 --compile=False

Config files are Python assignments. They run in order, then the flags: a later value wins. Every
name and type is checked against the dataclasses. A mistake is one line: what, where, what to do.
"""

import ast
import contextlib
import ctypes
import difflib
import inspect
import json
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
NANOGPT = {  # nanoGPT's names, and what to use here
    "lr": "learning_rate", "max_iters": "max_steps", "warmup_iters": "warmup_steps", "eval_interval": "val_interval",
    "dataset": "data_dir", "lr_decay_iters": "max_steps (the learning rate decays until max_steps)",
    "decay_lr": "schedule (--schedule=constant for decay_lr=False)", "eval_iters": "val_tokens (counted in tokens)",
    "gradient_accumulation_steps": "total_batch_size (tokens per step, over all GPUs)",
    "wandb_log": "log_to (--log_to=wandb)", "eval_only": "evaluate.py (it measures a model and does not train)",
}  # fmt: skip
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun tells a process
# torch has many words for it, in RuntimeErrors
MEMORY_ERRORS = "out of memory|ALLOC_FAILED|bad_alloc|can't allocate memory|not enough memory|Cannot allocate memory"
LESS_MEMORY = "use a smaller --batch_size, or in training --activation_checkpointing=True --chunked_loss=True"


class UserError(Exception):
    """The user's mistake, in one line: what is wrong, where, and what to do. The exit status is 2.

    `alone`: only this process raises it. By default all raise the same, and one of them prints it.
    """

    def __init__(self, message: str, alone: bool = False):
        super().__init__(" ".join(message.splitlines()))
        self.alone = alone


def configure(*classes: type, argv: list[str] | None = None, positional: str | None = None) -> tuple:
    """Fill dataclasses, whose options share one namespace, from the command line. Raises UserError.

    ['config/a.py', '--lr=1e-3'], (A, B) -> (A(...), B(...), {'lr': '--lr', ...}); the last says
    where each option was set. What is neither a flag nor a .py file sets the option `positional`.
    """
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        if os.environ.get("RANK", "0") == "0":
            print(help_text(classes, positional))
        sys.exit(0)

    # Read the settings, files first and then flags: a later one of the same name wins.
    hints = {name: hint for cls in classes for name, hint in hints_of(cls).items()}
    settings, flags = [], []
    for arg in argv:
        if arg.startswith("-"):
            flags.append(read_flag(arg, hints))
        elif positional and not arg.endswith(".py"):
            settings.append((positional, arg, arg))
        else:
            settings += read_file(arg, hints)
    values, given = {}, {}
    for name, value, where in settings + flags:
        values[name], given[name] = check(name, value, hints, where), where

    # Build the dataclasses. A rule across options that is broken says where they were set.
    instances = []
    for cls in classes:
        own = {name: values[name] for name in hints_of(cls) if name in values}
        try:
            instances.append(cls(**own))
        except ValueError as error:
            where = [given[name] for name in own if re.search(rf"\b{name}\b", str(error))]
            raise UserError(f"{', '.join(dict.fromkeys(where))}: {error}" if where else str(error)) from None
    return *instances, given


def hints_of(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)  # keeps PathStr, which is a plain str otherwise


def read_file(path: str, known: Collection[str]) -> list[tuple[str, Any, str]]:
    """Run a config file -> [(name, value, 'file:line')] of the options that it sets."""
    if not path.endswith(".py"):
        raise UserError(f"{path}: not a config file (.py), and options look like --name=value")
    if not os.path.isfile(path):
        others = [str(other) for other in Path(path).parent.glob("*.py") if other.is_file()]
        raise UserError(f"{path}: no such config file{nearest(path, others)}")
    namespace: dict[str, Any] = {"__file__": path, "__name__": "config"}
    try:
        source = Path(path).read_bytes()
        tree = ast.parse(source, path)
        exec(compile(tree, path, "exec"), namespace)
    except Exception as error:  # the file may be unreadable, and the user's own code may fail in any way
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        line = getattr(error, "lineno", None) or [1, *lines][-1]
        raise UserError(f"{path}:{line}: {traceback.format_exception_only(error)[-1]}") from None

    # The names that it assigns must be options, but for helpers: _name, and x in [x for x in y].
    stored = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    lines = {node.id: f"{path}:{node.lineno}" for node in stored}
    unknown = [name for name in lines if name in namespace and name not in known and not name.startswith("_")]
    if not unknown:
        return [(name, value, lines.get(name, path)) for name, value in namespace.items() if name in known]

    # A config starts with a comment that shows its command: "python fineweb.py config/..."
    command = re.search(rf"(\w+\.py) \S*\b{re.escape(Path(path).name)}\b", source.decode(errors="replace"))
    if command and command[1] != os.path.basename(sys.argv[0]):
        raise UserError(f"{path}: this is a config of {command[1]}: python {command[1]} {path}")
    advice = nearest(unknown[0], known) or f"; a helper variable starts with an underscore: _{unknown[0]}"
    raise UserError(f"{lines[unknown[0]]}: unknown option {unknown[0]!r}{advice}")


def read_flag(flag: str, hints: dict[str, Any]) -> tuple[str, Any, str]:
    """'--lr=1e-3' -> ('lr', 0.001, '--lr'). Values are Python literals, or else texts."""
    name, equals, text = flag.removeprefix("--").partition("=")
    if not (flag.startswith("--") and equals):
        raise UserError(f"{flag}: options look like --name=value{nearest(name.strip('-'), hints)}")
    try:
        value = ast.literal_eval(text.capitalize() if text.lower() in ("true", "false", "none") else text)
    except Exception:  # not a literal: a text; literal_eval raises many kinds of errors
        value = text
    # For a string option the text counts as typed: a folder may be called 2024, and quotes stay.
    kinds = kinds_of(hints.get(name))
    as_typed = fits(text, kinds) and (isinstance(value, str) or not fits(value, kinds))
    return name, text if as_typed else value, f"--{name}"


def check(name: str, value: Any, hints: dict[str, Any], where: str) -> Any:
    """The value in its option's type: 1 -> 1.0 for a float, 1e4 -> 10000 for an int. UserError."""
    if name not in hints:
        raise UserError(f"{where}: unknown option {name!r}{nearest(name, hints)}")
    if (name, value) == ("init_from", "resume"):
        raise UserError(f"{where}: init_from = 'resume' is nanoGPT's; use --resume=True")
    kinds = kinds_of(hints[name])
    if type(value) is int and float in kinds and int not in kinds:
        value = float(value)
    if type(value) is float and value.is_integer() and int in kinds and float not in kinds:
        value = int(value)
    if not fits(value, kinds):
        words = {int: "a whole number", float: "a finite number", bool: "True or False", str: "a text"}
        wanted = [words.get(kind, "None") if isinstance(kind, type) else repr(kind) for kind in kinds]
        near = nearest(value, [kind for kind in kinds if isinstance(kind, str)]) if isinstance(value, str) else ""
        raise UserError(f"{where}: {name} = {value!r}, but it must be {' or '.join(wanted)}{near}")
    return os.path.expanduser(value) if isinstance(value, str) and "a path" in str(hints[name]) else value


def kinds_of(hint: Any) -> list:
    """The types and words of an option: Literal['a', 'b'] | None -> ['a', 'b', NoneType]."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [kind for part in typing.get_args(hint) for kind in kinds_of(part)]
    return list(typing.get_args(hint)) if typing.get_origin(hint) is Literal else [str if hint is PathStr else hint]


def fits(value: Any, kinds: list) -> bool:
    finite = type(value) is not float or abs(value) < float("inf")  # False for NaN as well
    return finite and any(type(value) is kind if isinstance(kind, type) else value == kind for kind in kinds)


def at_least(instance: Any, least: float, *names: str) -> None:
    """For __post_init__: raises ValueError if an option is below `least`. None passes."""
    within(instance, least, float("inf"), *names)


def within(instance: Any, least: float, most: float, *names: str) -> None:
    """For __post_init__: raises ValueError if an option is not within least..most. None passes."""
    wanted = f"at least {least}" if most == float("inf") else f"{least} to {most}"
    for name in names:
        value = getattr(instance, name)
        if value is not None and not least <= value <= most:
            raise ValueError(f"{name} = {value}, but it must be {wanted}")


def nearest(word: str, known: Collection[str]) -> str:
    """'; did you mean X?' with the closest known word or the answer to a name of nanoGPT, or ''."""
    answer = NANOGPT.get(word, "none")
    replacement = answer.split()[0]
    if replacement in known or replacement.endswith(".py"):
        return f"; did you mean {answer}?"
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {matches[0]}?" if matches else ""


def help_text(classes: Collection[type], positional: str | None = None) -> str:
    """Every option with its default, choices and comment, grouped as in the dataclass's source."""
    script = os.path.basename(sys.argv[0]) + (f" [{positional.upper()}]" if positional else "")
    lines = [(sys.modules["__main__"].__doc__ or "").strip(), ""]
    lines += [f"usage: python {script} [config/file.py ...] [--name=value ...]"]
    for cls in [part for whole in classes for part in whole.__mro__[:-1]]:  # own options, then inherited ones
        hints, heading = hints_of(cls), cls.__name__
        # A comment on its own line starts a group; an option is "name: type = default  # comment".
        for line in inspect.getsource(cls).partition("def ")[0].splitlines():
            if group := re.fullmatch(r" +# (.*)", line):
                heading = group[1]
            elif option := re.fullmatch(r" +(\w+): (?:.*?  # (.*)|.*)", line):
                lines += ["", f"{heading}:"] if heading else []
                heading, name, comment = "", option[1], option[2] or ""
                choices = "|".join(kind for kind in kinds_of(hints[name]) if isinstance(kind, str))
                default = f"--{name}={cls.__dataclass_fields__[name].default}"
                lines += [f"  {default:<32} {choices}{'  ' * bool(choices)}{comment}".rstrip()]
    return "\n".join(lines)


# ---- The frame of every script


def cli(main: Callable[[], int | None]) -> typing.NoReturn:
    """Run a script's `main` and exit with what it returns; a UserError is one line and status 2."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the scripts switch it off while they import
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr, progress_bars=True)
    end_with_torchrun()
    try:
        status = main() or 0
    except UserError as error:
        if not error.alone and os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(10)  # torchrun kills all processes once one ends; local rank 0 needs time to print
        else:
            tell(f"error: {error}")
        status = 2
    except KeyboardInterrupt:
        status = 130  # the shell's number for Ctrl-C
    except Exception as error:
        memory = out_of_memory(error)
        if not memory and not under_torchrun():
            raise
        tell(f"error: {memory}; {LESS_MEMORY}" if memory else traceback.format_exc())
        status = 2 if memory else 1
    if under_torchrun():  # skip Python's shutdown, which gloo's threads sometimes abort
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


def tell(text: str) -> None:
    """Print why this process ends. torchrun's long report follows, and ends with its error file."""
    print(text, file=sys.stderr, flush=True)
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        message = {"message": text, "extraInfo": {"timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):  # on a full disk, the line above has to do
            Path(path).write_text(json.dumps({"message": message}))


def under_torchrun() -> bool:
    """Whether torchrun, or something that sets the same variables, started this process."""
    return all(name in os.environ for name in TORCHRUN)


def end_with_torchrun() -> None:
    """Ask Linux for a SIGTERM when torchrun dies, even by SIGKILL. Call it before slow imports."""
    if under_torchrun() and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG


class Output:
    """stdout or stderr, with two changes. A stream that fails (a closed pipe, a full disk, a lost
    terminal) does not end the run. No control characters reach a terminal, which they steer."""

    def __init__(self, stream: IO | None, progress_bars: bool = False):
        self.stream = stream or open(os.devnull, "w")  # noqa: SIM115 (None: closed before Python started)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # characters that the terminal's encoding lacks
        harmless = r"(?!\r|\x1b\[[AK])" if progress_bars else ""  # to the line's start, up a line, erase the line
        self.control = re.compile(harmless + r"[\x00-\x08\x0b-\x1f\x7f-\x9f]") if self.stream.isatty() else None

    def write(self, text: str) -> int:
        if self.control:
            text = self.control.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
        with contextlib.suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:  # fileno, isatty, encoding, ...
        return getattr(self.stream, name)


def out_of_memory(error: BaseException) -> str | None:
    """'out of memory (2.00 GiB more were wanted)' if a GPU or CPU had none left, else None."""
    if not (isinstance(error, MemoryError) or re.search(MEMORY_ERRORS, str(error))):
        return None
    wanted = re.search(r"ried to allocate ([\d.]+ ?\w+)", str(error))
    return "out of memory" + (f" ({wanted[1]} more were wanted)" if wanted else "")
