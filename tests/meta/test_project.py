"""The files around the code agree with it and with one another: version, public names, Makefile, READMEs."""

import importlib
import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from enum import Enum
from pathlib import Path

import pytest

import msft_peft

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
PAGES = [
    "README.md",
    "README_CN.md",
    "CONTRIBUTING.md",
    *sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md")),
]
# A page may also show the reader's own scripts; those in these folders are ours and must be there.
OURS = {"examples", "benchmarks", "tests", "docs", "msft_peft"}


def read(name: str) -> str:
    """The text of a file at the root."""
    return (ROOT / name).read_text("utf-8")


def make_targets(makefile: str) -> set[str]:
    """The targets that `make help` lists."""
    return set(re.findall(r"^([a-z0-9.-]+):.*## ", makefile, re.MULTILINE))


def code_in(page: str) -> Iterator[tuple[str, str]]:
    """The pieces of code in a Markdown page: (language, text); inline code has the language "inline"."""
    fence = re.compile(r"^ *```(\w*)[^\n]*\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
    yield from fence.findall(page)
    yield from (("inline", text) for text in re.findall(r"`([^`\n]+)`", fence.sub("", page)))


def unknown_commands(page: str, targets: set[str]) -> set[str]:
    """`make x` in code where the Makefile has no target x, and `python x.py` where there is no such file."""
    bad = set()
    for language, text in code_in(page):
        if language in {"", "inline", "bash", "sh", "shell", "console"}:
            made = re.findall(r"(?:^|[;&$]\s*)make ((?:[A-Z]+=\S+ )*)([a-z][\w.-]*)", text, re.MULTILINE)
            bad |= {f"make {target}" for _, target in made if target not in targets}
            scripts = re.findall(r"(?:^|[;&$]\s*|/)python3? ([\w./-]+\.py)", text, re.MULTILINE)
            bad |= {script for script in scripts if script.split("/")[0] in OURS and not (ROOT / script).is_file()}
    return bad


def undocumented(module: object, names: Iterable[str]) -> list[str]:
    """The classes and functions among `names` without a docstring; what dataclass or Enum writes by itself is none."""
    missing = []
    for name in names:
        thing = getattr(module, name)
        if inspect.isclass(thing) or inspect.isroutine(thing):
            text = thing.__doc__ or ""
            if not text.strip() or text.startswith(f"{thing.__name__}(") or text == "An enumeration.":
                missing.append(name)
    return missing


def test_version_has_one_home():
    assert "version" in PYPROJECT["project"]["dynamic"]
    source = read(PYPROJECT["tool"]["hatch"]["version"]["path"])
    assert re.findall(r'^__version__ = "(.+)"$', source, re.MULTILINE) == [msft_peft.__version__]


def test_scripts_exist():
    for target in PYPROJECT["project"].get("scripts", {}).values():
        module, name = target.split(":")
        assert callable(getattr(importlib.import_module(module), name))


def test_public_names_exist_and_are_documented():
    assert len(msft_peft.__all__) == len(set(msft_peft.__all__))
    assert [name for name in msft_peft.__all__ if not hasattr(msft_peft, name)] == []
    assert undocumented(msft_peft, msft_peft.__all__) == []


def test_undocumented_bites():
    class Documented:
        """Yes."""

    class Bare(Documented):
        pass

    class Dataclassed:
        __doc__ = "Dataclassed(x: int)"

    class Holder:
        good, bare, enum = Documented, Bare, Enum("enum", "A")
        record = Dataclassed
        constant = 1
        function = staticmethod(lambda: None)

    Holder.enum.__doc__ = "An enumeration."  # what Python 3.10 writes
    names = ["good", "bare", "enum", "record", "constant", "function"]
    assert undocumented(Holder, names) == ["bare", "enum", "record", "function"]


def test_targets_are_phony():
    # A target whose name is a folder's (notebooks) does nothing, and says nothing, unless it is phony.
    phony = set(re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)[0].split())
    assert make_targets(MAKEFILE) == phony


@pytest.mark.parametrize("name", PAGES)
def test_commands_of_a_page_exist(name: str):
    assert unknown_commands(read(name), make_targets(MAKEFILE)) == set()


def test_readme_shows_the_first_steps():
    for name in ("README.md", "README_CN.md"):
        code = "\n".join(text for _, text in code_in(read(name)))
        assert "make quickstart" in code, name
        assert "make test" in code, name


def test_unknown_commands_bites():
    page = """
Run `make nothing`, which is not to make nonsense.

```bash
make help && make PYTHON=python3.12 never
python examples/nowhere.py && python train.py
```
"""
    commands = {"make nothing", "make never", "examples/nowhere.py"}
    assert unknown_commands(page, make_targets(MAKEFILE)) == commands


def test_nothing_is_passed_over_where_methods_are_proved():
    """A case that does not apply is left out of the table, or it is said what holds for it."""
    found = re.compile(r"\b(skip|skipif|importorskip|xfail)\(")
    files = [path for folder in ("contract", "parity", "cases") for path in (ROOT / "tests" / folder).rglob("*.py")]
    assert len(files) > 50
    assert [str(path.relative_to(ROOT)) for path in files if found.search(path.read_text("utf-8"))] == []
