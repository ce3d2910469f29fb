"""README.md and docs/*.md: scripts accept every command, and the files, options and links are there."""

import importlib
import re
import shlex
from dataclasses import asdict, is_dataclass
from pathlib import Path

import pytest

import configurator

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted(ROOT.glob("docs/*.md")))]
RECORDS = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("records/**/*.md"))]
COMMAND = re.compile(r"""(?:python |torchrun [^`|;&\n]*?)(\w+)\.py\b((?:"[^"\n]*"|'[^'\n]*'|[^`|;&"'\n])*)""")
GIVEN = re.compile(r"gpt2|bytes$|scratch$|out/quickstart|[A-Z]+$")  # the last are the reader's own
DIFF = re.compile(r"^--- .*\n\+\+\+ b/(.*)\n((?:[@ +-].*\n)+)", re.MULTILINE)  # a file and its hunks


class Configured(Exception): ...  # it carries the options that a script has read


def run(script: str, args: list[str], monkeypatch) -> dict:
    """All options of a command, as the script's own main() reads them before it does anything."""

    def configure(*classes, **how):
        found = configurator.configure(*classes, **{"argv": args} | how)
        raise Configured(dict(item for part in found if is_dataclass(part) for item in asdict(part).items()))

    module = importlib.import_module(script)
    monkeypatch.setattr(module, "configure", configure)
    monkeypatch.setattr("sys.argv", [f"{script}.py", *args])
    with pytest.raises(Configured) as caught:
        module.main()
    return caught.value.args[0]


@pytest.mark.parametrize("name", PAGES)
def test_every_command_would_run(name, monkeypatch, tmp_path):
    """Its options are the script's, and what it reads is in the repository or made by an earlier command."""
    monkeypatch.chdir(ROOT)
    text = "".join(Path(page).read_text() for page in dict.fromkeys(("README.md", name))).replace("\\\n", " ")
    made = {run("fineweb", [str(path)], monkeypatch)["out_dir"] for path in Path("config/data").glob("*.py")}
    added = re.findall(r'^\+.*"(\w+)"\]', text, re.MULTILINE)  # values that a diff on this page adds to an option
    new = {path: hunks for path, hunks in DIFF.findall(text) if "@@ -0,0" in hunks}  # files that it adds
    for path in new:
        (tmp_path / Path(path).name).write_text(re.sub(r"^(@.*\n|\+)", "", new[path], flags=re.MULTILINE))
    for script, args in COMMAND.findall(text):
        args = shlex.split(re.sub(r"\$\w+", "1", args), comments=True)
        args = [str(tmp_path / Path(arg).name) if arg in new else arg for arg in args]
        options = run(script, [arg for arg in args if arg.partition("=")[2] not in added], monkeypatch)
        assert {arg[2:].partition("=")[0] for arg in args if arg[:2] == "--"} <= options.keys(), args
        inputs = [options.get(option) for option in ("data_dir", "model", "init_from", "tokenizer")]
        for path in filter(None, [*inputs, *(arg for arg in args if arg[0] != "-" and arg[-3:] != ".py")]):
            known = re.sub(r"_\d$", "_1", path) in made or GIVEN.match(path)
            assert known, f"{script}.py {' '.join(args)}: no earlier command makes {path}"
        made |= {options.get("out_dir"), options.get("out")}


@pytest.mark.parametrize("name", PAGES + RECORDS)
def test_every_name_in_it_is_right(name):
    page, text = ROOT / name, (ROOT / name).read_text()
    paths = [page.parent / link for link in re.findall(r"\]\((?!https?:)([^)#]+)", text)]
    if name in PAGES:
        found = re.findall(r"(?<![\w/.-])((?:config|records|tests|docs)/[\w./-]*\w)", text)
        paths += [ROOT / path for path in found if f"+++ b/{path}" not in text]
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {*re.findall(r"(?:^ *|`)make (\w+)", text, re.MULTILINE)} <= {*targets}
        fields = re.findall(r"^    (\w+): .* = ", "".join(path.read_text() for path in ROOT.glob("*.py")), re.MULTILINE)
        assert {*re.findall(r"`--(\w+)=", text)} <= {*fields}
    assert [str(path) for path in paths if not path.exists()] == []


def test_diffs_fit_the_code():
    for path, hunks in DIFF.findall((ROOT / "docs/extending.md").read_text()):
        for hunk in re.split(r"^@@.*\n", hunks, flags=re.MULTILINE)[1:]:
            before = "".join(line[1:] for line in hunk.splitlines(True) if line[0] != "+")
            assert not before or before in (ROOT / path).read_text(), f"{path}:\n{hunk}"
