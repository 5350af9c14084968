"""The documents' Python blocks run as they stand, in a folder that has what they speak of."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import mindspore as ms
import pytest

from msft_peft.models import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "README_CN.md"]
# Of the other pages those whose blocks can run by themselves.
PAGES += [
    f"docs/{page.name}"
    for page in sorted((ROOT / "docs").glob("*.md"))
    if "```python" in page.read_text(encoding="utf-8") and page.name not in ("distributed.md", "hosts.md")
]


@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run(page, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    assert blocks, f"{page} has no Python block"
    ms.set_seed(0)
    settings = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64}
    config = LlamaConfig(**settings, num_hidden_layers=2, num_attention_heads=4)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "path/to/llama")
    script = tmp_path / "blocks.py"  # a file: graph mode compiles no code without one
    script.write_text("\n".join(blocks), encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.strip()


def test_the_table_of_methods_is_that_of_the_registry():
    spec = importlib.util.spec_from_file_location("methods_table", ROOT / "docs/methods_table.py")
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    text = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
    assert maker.page(text) == text, "write it anew: python docs/methods_table.py"


def test_both_readmes_say_the_same():
    english, chinese = ((ROOT / page).read_text(encoding="utf-8") for page in PAGES[:2])

    def skeleton(text):
        code = [re.sub(r"#.*", "", block) for block in re.findall(r"```\w+\n(.*?)```", text, re.DOTALL)]
        links = [link for link in re.findall(r"\]\((.*?)\)", text) if not link.startswith("README")]
        prose = re.sub(r"```\w+\n.*?```", "", text, flags=re.DOTALL)
        parts = re.split(r"\n\s*\n|\n(?=[-|#])", prose)
        names = [sorted(found) for part in parts if (found := re.findall(r"`([^`]+)`", part))]
        return code, names, sorted(links), len(re.findall(r"^## ", text, re.MULTILINE))

    assert skeleton(english) == skeleton(chinese)


def test_links_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "README_CN.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert link.startswith("http") or (page.parent / link).exists(), f"{page.name}: {link}"
