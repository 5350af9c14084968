"""`import msft_peft` pulls in no other framework, not even one that is there and would be tried quietly."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UNWANTED = ("torch", "transformers", "peft", "accelerate", "mindnlp", "mindformers", "mindone")


def imported_with(statement: str, folder: Path) -> set[str]:
    """Which of the UNWANTED a fresh interpreter has loaded after `statement`.

    Stand-ins make every one of them importable, so the answer is the same whether or not torch is installed here.
    """
    for name in UNWANTED:
        (folder / f"{name}.py").write_text("")
    code = f"{statement}\nimport sys\nprint(*[name for name in {UNWANTED!r} if name in sys.modules])"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def modules() -> list[str]:
    """The library's modules by dotted name; those under hosts are imported only by who has the host."""
    paths = [path.relative_to(ROOT).with_suffix("") for path in sorted((ROOT / "msft_peft").rglob("*.py"))]
    names = [".".join(path.parts).removesuffix(".__init__") for path in paths if path.name != "__main__"]
    return [name for name in names if not name.startswith("msft_peft.hosts")]


@pytest.mark.parametrize(
    "statement", ["import msft_peft", f"import {', '.join(modules())}"], ids=["package", "modules"]
)
def test_no_other_framework(statement: str, tmp_path: Path):
    assert imported_with(statement, tmp_path) == set()


def test_a_quiet_attempt_is_seen(tmp_path: Path):
    assert imported_with("try:\n    import torch\nexcept ImportError:\n    pass", tmp_path) == {"torch"}
