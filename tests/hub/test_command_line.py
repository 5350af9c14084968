"""The command line against the Hub."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from msft_peft.cli import main
from tests.hub.server import Fault, Hub
from tests.hub.test_round_trip import FILES, adapted


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved adapter, with what does not belong onto the Hub beside it."""
    adapted().save_pretrained(tmp_path / "adapter")
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "adapter" / ".env").write_text("secret")
    (tmp_path / "adapter" / "link.json").symlink_to(tmp_path / "secret")
    (tmp_path / "adapter" / "checkpoint-3").mkdir()
    (tmp_path / "adapter" / "checkpoint-3" / "optimizer.ckpt").write_text("large")
    return tmp_path / "adapter"


def test_push(hub: Hub, folder: Path, capsys: pytest.CaptureFixture):
    assert main(["push", str(folder), "ada/lora", "--private", "--message", "Here"]) == 0
    assert capsys.readouterr().out.strip().startswith(f"{hub.url}/ada/lora/commit/")
    assert hub.files("ada/lora").keys() == FILES
    assert hub.last("ada/lora")["title"] == "Here"
    assert main(["push", str(folder), "ada/lora", "--token", "hf_bob"]) == 1
    assert "could not be written to" in capsys.readouterr().err
    hub.put("ada/lora", {"README.md": b"---\nlicense: mit\ntags:\n- theirs\n---\n# Words\n"})
    assert main(["push", str(folder), "ada/lora", "--create-pr"]) == 0
    assert capsys.readouterr().out.strip() == f"{hub.url}/ada/lora/discussions/1"
    card = ModelCard(hub.files("ada/lora", "refs/pr/1")["README.md"].decode())
    assert card.text.strip() == "# Words"
    assert (card.data.license, card.data.library_name) == ("mit", "peft")
    assert {"theirs", "lora"} <= set(card.data.tags)


def test_inspect_what_is_on_the_hub(hub: Hub, hasty: None, capsys: pytest.CaptureFixture):
    model = adapted()
    model.push_to_hub("ada/lora", revision="next")
    assert main(["inspect", "ada/lora", "--revision", "next"]) == 0
    assert "layers.0.attn.q" in capsys.readouterr().out
    assert main(["inspect", "ada/lora"]) == 1
    assert "Can't find 'adapter_config.json' at 'ada/lora'" in capsys.readouterr().err
    hub.faults.append(Fault("GET /lfs/", "drop", 10**6))
    assert main(["inspect", "ada/lora", "--revision", "next"]) == 0  # from the cache
