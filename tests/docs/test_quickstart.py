"""The quickstart, on few steps: it runs to the end, learns, and keeps what it promises."""

import importlib
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.slow
def test_the_quickstart_keeps_its_promises(tmp_path, monkeypatch):
    # By name and from its folder: the compiler looks functions up in their module.
    monkeypatch.syspath_prepend(str(EXAMPLES))
    quickstart = importlib.import_module("quickstart")
    lines = []
    figures = quickstart.main(40, tmp_path, say=lambda *words: lines.append(" ".join(map(str, words))))
    assert figures["lora"] < figures["base"] - 0.2
    assert figures["full"] < figures["base"] - 0.2
    assert figures["reload_error"] == 0
    assert figures["merge_error"] < 1e-3
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert names == {"README.md", "adapter_config.json", "adapter_model.ckpt", "adapter_model.safetensors"}
    assert (tmp_path / "loss.png").stat().st_size > 5000
    assert any("def __init__" in line for line in lines)
