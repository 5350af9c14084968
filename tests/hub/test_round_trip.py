"""Push, load again: over HTTP, by the real client, in this process and in a fresh one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard, constants

from msft_peft import (
    AutoPeftModelForCausalLM,
    HubError,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    load_peft_weights,
)
from msft_peft.models import AutoModelForCausalLM
from tests import nets
from tests.hub.conftest import point_at
from tests.hub.server import Hub
from tests.models import tiny
from tests.tolerances import assert_same

ROOT = Path(__file__).parents[2]
FILES = {"README.md", "adapter_config.json", "adapter_model.ckpt", "adapter_model.safetensors"}


def adapted(seed: int = 1, **config: Any) -> PeftModel:
    """An adapter that does something."""
    model = get_peft_model(nets.Blocks(), LoraConfig(**{"r": 4, "target_modules": ["q"], **config}))
    for p in model.trainable_params():
        p.set_data(nets.ms.Tensor(np.random.RandomState(seed).randn(*p.shape).astype(np.float32)))
    return model


def weights(model: PeftModel) -> dict[str, np.ndarray]:
    return {p.name: p.asnumpy() for p in model.get_parameters() if "lora_" in p.name}


def assert_equal(one: PeftModel, two: PeftModel) -> None:
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys()
    for name in first:
        assert_same(first[name], second[name], "exact")


def test_push_and_load(hub: Hub, tmp_path: Path):
    model = adapted()
    commit = model.push_to_hub("ada/lora", commit_message="First", commit_description="why", tags=["mine"])
    assert commit.commit_url.startswith(hub.url)
    assert hub.files("ada/lora").keys() == FILES
    assert (hub.last("ada/lora")["title"], hub.last("ada/lora")["description"]) == ("First", "why")
    assert any(line.startswith("PUT /lfs/") for line in hub.log)
    loaded = PeftModel.from_pretrained(nets.Blocks(), "ada/lora")
    assert_equal(model, loaded)
    assert sorted(load_peft_weights("ada/lora")) == sorted(load_peft_weights(_saved(model, tmp_path)))
    card = ModelCard(hub.files("ada/lora")["README.md"].decode())
    assert {"mine", "lora", "mindspore"} <= set(card.data.tags)
    assert 'PeftModel.from_pretrained(base_model, "ada/lora")' in card.text


def _saved(model: PeftModel, folder: Path) -> Path:
    model.save_pretrained(folder / "saved")
    return folder / "saved"


def test_what_is_pushed_is_what_is_saved(hub: Hub, tmp_path: Path):
    model = adapted()
    model.push_to_hub("ada/lora")
    folder = _saved(model, tmp_path)
    for name in FILES - {"README.md"}:
        assert hub.files("ada/lora")[name] == (folder / name).read_bytes(), name


def test_a_name_alone_is_in_ones_own_account(hub: Hub):
    adapted().push_to_hub("lora")
    assert hub.files("ada/lora").keys() == FILES


def test_several_adapters_and_subfolders(hub: Hub):
    model = adapted()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["v"], init_lora_weights=False))
    model.push_to_hub("ada/both")
    assert hub.files("ada/both").keys() == FILES | {f"other/{name}" for name in FILES - {"README.md"}}
    other = PeftModel.from_pretrained(nets.Blocks(), "ada/both", subfolder="other")
    assert other.peft_config["default"].r == 2
    model.push_to_hub("ada/one", selected_adapters=["other"])
    assert hub.files("ada/one").keys() == {f"other/{name}" for name in FILES - {"README.md"}} | {"README.md"}


def test_branches_and_commits(hub: Hub):
    first, second = adapted(1), adapted(2)
    commit = first.push_to_hub("ada/lora")
    second.push_to_hub("ada/lora", revision="next")
    assert_equal(first, PeftModel.from_pretrained(nets.Blocks(), "ada/lora"))
    assert_equal(second, PeftModel.from_pretrained(nets.Blocks(), "ada/lora", revision="next"))
    second.push_to_hub("ada/lora")
    assert_equal(second, PeftModel.from_pretrained(nets.Blocks(), "ada/lora"))
    assert_equal(first, PeftModel.from_pretrained(nets.Blocks(), "ada/lora", revision=commit.oid))


def test_pull_requests(hub: Hub):
    """Anybody who may read may propose; the branch stays as it was."""
    adapted(1).push_to_hub("ada/lora")
    before = hub.files("ada/lora")
    proposal = adapted(2).push_to_hub("ada/lora", token="hf_bob", create_pr=True)
    assert proposal.pr_url == f"{hub.url}/ada/lora/discussions/1"
    assert hub.files("ada/lora") == before
    assert_equal(adapted(2), PeftModel.from_pretrained(nets.Blocks(), "ada/lora", revision="refs/pr/1"))


def test_private_repositories(hub: Hub):
    adapted().push_to_hub("ada/secret", private=True)
    PeftModel.from_pretrained(nets.Blocks(), "ada/secret", token="hf_ada")
    for token in (False, "hf_bob"):
        with pytest.raises(ValueError, match=r"(?s)Can't find 'adapter_config.json' at 'ada/secret'.*token="):
            PeftModel.from_pretrained(nets.Blocks(), "ada/secret", token=token, force_download=True)


def test_a_card_on_the_hub_keeps_its_text(hub: Hub):
    hub.create("ada/lora")
    hub.put("ada/lora", {"README.md": b"---\nlicense: mit\n---\n# My own words\n", "notes.txt": b"keep"})
    adapted().push_to_hub("ada/lora", metrics={"accuracy": 0.91})
    card = ModelCard(hub.files("ada/lora")["README.md"].decode())
    assert (card.data.license, card.data.library_name, card.data.metrics) == ("mit", "peft", ["accuracy"])
    assert "# My own words" in card.text
    assert "| accuracy | 0.91 |" in card.text
    assert "## Use it" not in card.text
    assert hub.files("ada/lora")["notes.txt"] == b"keep"


def test_a_local_base_model_is_not_in_the_metadata(hub: Hub, tmp_path: Path):
    """The Hub refuses cards whose base_model is none of its own."""
    tiny.decoder().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(base, LoraConfig(r=2)).push_to_hub("ada/lora")
    assert str(tmp_path / "base") in hub.files("ada/lora")["README.md"].decode()


def test_configs(hub: Hub):
    config = LoraConfig(r=3, target_modules=["q"], task_type="CAUSAL_LM")
    config.push_to_hub("ada/config", private=True, revision="draft")
    assert hub.files("ada/config", "draft").keys() == {"adapter_config.json"}
    assert hub.files("ada/config") == {}
    assert PeftConfig.from_pretrained("ada/config", revision="draft").to_dict() == config.to_dict()


def test_reference_models(hub: Hub):
    model = tiny.decoder()
    model.push_to_hub("ada/tiny", private=True, commit_message="Base")
    assert hub.files("ada/tiny").keys() == {"config.json", "model.safetensors"}
    loaded = AutoModelForCausalLM.from_pretrained("ada/tiny")
    assert loaded.name_or_path == "ada/tiny"
    for p, q in zip(model.get_parameters(), loaded.get_parameters()):
        assert_same(p.asnumpy(), q.asnumpy(), "exact")
    adapter = get_peft_model(loaded, LoraConfig(r=2, task_type="CAUSAL_LM"))
    adapter.push_to_hub("ada/tiny-lora")
    card = ModelCard(hub.files("ada/tiny-lora")["README.md"].decode())
    assert card.data.base_model == "ada/tiny"
    assert card.text.count('AutoPeftModelForCausalLM.from_pretrained("ada/tiny-lora")') == 2
    # The repository is private, and so is what the card says to do.
    for options in ({"token": "hf_ada"}, {"local_files_only": True}):
        again = AutoPeftModelForCausalLM.from_pretrained("ada/tiny-lora", **options)
        assert again.get_base_model().name_or_path == "ada/tiny"


def test_the_cache_serves_when_the_hub_is_not_asked(hub: Hub):
    model = adapted()
    model.push_to_hub("ada/lora")
    PeftModel.from_pretrained(nets.Blocks(), "ada/lora")
    asked = len(hub.log)
    assert_equal(model, PeftModel.from_pretrained(nets.Blocks(), "ada/lora", local_files_only=True))
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config.json' at 'ada/never'.*cache"):
        PeftModel.from_pretrained(nets.Blocks(), "ada/never", local_files_only=True)
    assert len(hub.log) == asked


def test_the_cache_serves_when_the_hub_is_gone(hub: Hub, hasty: None, monkeypatch: pytest.MonkeyPatch):
    model = adapted()
    model.push_to_hub("ada/lora")
    PeftModel.from_pretrained(nets.Blocks(), "ada/lora")
    nowhere = "http://127.0.0.1:9"
    point_at(nowhere, Path(constants.HF_HUB_CACHE), monkeypatch)
    assert_equal(model, PeftModel.from_pretrained(nets.Blocks(), "ada/lora"))
    with pytest.raises(HubError, match="could not be had from the Hub"):
        load_peft_weights("ada/never")


def test_cache_dir_and_force_download(hub: Hub, tmp_path: Path):
    adapted().push_to_hub("ada/lora")
    PeftModel.from_pretrained(nets.Blocks(), "ada/lora", cache_dir=tmp_path / "mine")
    assert list((tmp_path / "mine").rglob("adapter_model.safetensors"))
    bodies = [line for line in hub.log if line.startswith("GET /lfs/")]
    PeftModel.from_pretrained(nets.Blocks(), "ada/lora", cache_dir=tmp_path / "mine")
    assert [line for line in hub.log if line.startswith("GET /lfs/")] == bodies
    PeftModel.from_pretrained(nets.Blocks(), "ada/lora", cache_dir=tmp_path / "mine", force_download=True)
    assert len([line for line in hub.log if line.startswith("GET /lfs/")]) == len(bodies) + 1


@pytest.mark.parametrize("offline", [False, True])
def test_in_a_fresh_process(hub: Hub, tmp_path: Path, offline: bool):
    """With nothing but the client's own settings in the environment."""
    adapted().push_to_hub("ada/lora")
    expected = {key: t.asnumpy() for key, t in load_peft_weights("ada/lora").items()}
    asked = len(hub.log)
    code = (
        "import json; from msft_peft import load_peft_weights\n"
        "found = load_peft_weights('ada/lora')\n"
        "print(json.dumps({key: t.asnumpy().tolist() for key, t in found.items()}))"
    )
    # Online nothing is in the cache; offline there is nothing else.
    cache = tmp_path / ("cache" if offline else "empty")
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": str(int(offline))}
    settings |= {"HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | settings, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (len(hub.log) == asked) == offline
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == expected.keys()
    for key in found:
        assert_same(np.array(found[key], np.float32), expected[key], "exact")
