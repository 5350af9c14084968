"""What goes wrong on the way to the Hub and back: a plain word, nothing lost, nothing half written."""

import contextlib
import errno
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants

from msft_peft import AdapterNameError, ConfigError, HubError, PeftModel, load_peft_weights
from msft_peft.models import AutoModelForCausalLM
from tests import nets
from tests.hub.server import Fault, Hub
from tests.hub.test_round_trip import adapted, assert_equal

WEIGHTS = r"GET /lfs/"


def test_a_connection_that_is_cut(hub: Hub, hasty: None):
    """The client takes it up again by itself, or, before its version 1, when it is called again."""
    model, loaded = adapted(), None
    model.push_to_hub("ada/lora")
    hub.faults.append(Fault(WEIGHTS, "cut"))
    with contextlib.suppress(HubError):
        loaded = PeftModel.from_pretrained(nets.Blocks(), "ada/lora")
    assert_equal(model, loaded or PeftModel.from_pretrained(nets.Blocks(), "ada/lora"))
    assert hub.faults[0].times == 0


def test_a_download_that_never_ends_well(hub: Hub, hasty: None):
    """An error that says so; the cache holds no half file, and later all is well."""
    model = adapted()
    model.push_to_hub("ada/lora")
    base = nets.Blocks()
    before = {name: p.asnumpy().copy() for name, p in base.parameters_and_names()}
    for kind in ("cut", "drop", 500):
        hub.faults = [Fault(WEIGHTS, kind, times=10**6)]
        with pytest.raises(HubError, match=r"'adapter_model.safetensors' could not be had from the Hub"):
            PeftModel.from_pretrained(base, "ada/lora")
    after = {name: p.asnumpy() for name, p in base.parameters_and_names()}
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    hub.faults = []
    assert_equal(model, PeftModel.from_pretrained(base, "ada/lora"))


def test_a_full_disk_while_downloading(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    adapted().push_to_hub("ada/lora")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.file_download.http_get", full)
        with pytest.raises(HubError, match=r"(?s)No space left on device.*cache_dir"):
            load_peft_weights("ada/lora")
    assert load_peft_weights("ada/lora")


def test_the_cause_of_a_missing_adapter_is_told(hub: Hub):
    hub.create("ada/empty")
    adapted().push_to_hub("ada/secret", private=True)
    for repo, options, says in (
        ("ada/empty", {}, "Can't find 'adapter_config.json' at 'ada/empty'$"),
        ("ada/nothing", {}, "(?s)Can't find .*404.*token="),
        ("ada/nothing", {"token": False}, "(?s)Can't find .*401.*token="),
        ("ada/secret", {"token": "hf_bob"}, "(?s)Can't find .*404.*token="),
        ("ada/secret", {"token": "hf_wrong"}, "(?s)Can't find .*401.*token="),
        ("ada/secret", {"revision": "v9"}, "(?s)Can't find .*Revision Not Found"),
    ):
        with pytest.raises(ConfigError, match=says):
            PeftModel.from_pretrained(nets.Blocks(), repo, **options)


def test_an_adapter_without_weights(hub: Hub):
    adapted().peft_config["default"].push_to_hub("ada/config")
    with pytest.raises(FileNotFoundError, match="has no adapter weights: none of"):
        PeftModel.from_pretrained(nets.Blocks(), "ada/config")


def test_who_may_not_write_is_told_so(hub: Hub):
    model = adapted()
    model.push_to_hub("ada/lora")
    before = hub.files("ada/lora")
    for repo, token, says in (
        ("ada/lora", "hf_bob", "(?s)'ada/lora' on the Hub could not be written to: 403.*token="),
        ("ada/new", "hf_bob", "(?s)'ada/new' on the Hub could not be written to: 403.*token="),
        ("ada/lora", "hf_wrong", "(?s)could not be written to.*401.*token="),
        ("ada/lora", False, "(?s)could not be written to.*401.*token="),
        ("not a/name", "hf_ada", "(?s)could not be written to.*[Rr]epo"),
    ):
        with pytest.raises(HubError, match=says):
            model.push_to_hub(repo, token=token)
    assert hub.files("ada/lora") == before
    assert not hub.path("ada/new").exists()


@pytest.mark.parametrize("where", ["PUT /lfs/", "POST /api/models/ada/lora/commit", "POST .*/preupload/"])
@pytest.mark.parametrize("kind", ["drop", 500])
def test_an_upload_that_fails_leaves_what_was_there(hub: Hub, hasty: None, where: str, kind: str):
    first, second = adapted(1), adapted(2)
    first.push_to_hub("ada/lora")
    before = hub.files("ada/lora")
    hub.faults = [Fault(where, kind, times=10**6)]
    with pytest.raises(HubError, match="'ada/lora' on the Hub could not be written to"):
        second.push_to_hub("ada/lora")
    assert hub.files("ada/lora") == before
    hub.faults = []
    second.push_to_hub("ada/lora")
    assert_equal(second, PeftModel.from_pretrained(nets.Blocks(), "ada/lora"))


def test_private_is_no_wish(hub: Hub):
    """HF ignores `private` for a repository that exists: what was to be secret is then public."""
    model = adapted()
    model.push_to_hub("ada/lora")
    before = hub.files("ada/lora")
    with pytest.raises(HubError, match=r"'ada/lora' exists and is public; nothing was uploaded.*update_repo_settings"):
        model.push_to_hub("ada/lora", private=True)
    assert hub.files("ada/lora") == before
    model.push_to_hub("ada/lora", private=False)


def test_what_cannot_be_pushed_is_refused_before_the_hub_is_asked(hub: Hub):
    model = adapted()
    for options, error in (
        ({"max_shard_size": "5GB"}, TypeError),
        ({"safe_serialization": False}, NotImplementedError),
        ({"selected_adapters": ["nobody"]}, AdapterNameError),
        ({"save_embedding_layers": "yes"}, ValueError),
    ):
        with pytest.raises(error):
            model.push_to_hub("ada/lora", **options)
    assert hub.log == []


def test_reference_models(hub: Hub, hasty: None):
    for repo, options, error in (
        ("ada/nothing", {}, FileNotFoundError),
        ("ada/nothing", {"local_files_only": True}, FileNotFoundError),
        ("ada/nothing", {"token": "hf_wrong"}, HubError),
    ):
        with pytest.raises(error, match=f"'{repo}' is no directory here, and could not be had from the Hub"):
            AutoModelForCausalLM.from_pretrained(repo, **options)


def test_no_file_is_taken_from_outside_a_folder(tmp_path: Path):
    adapted().save_pretrained(tmp_path / "one")
    (tmp_path / "two").mkdir()
    with pytest.raises(ValueError, match=r"subfolder= names .*outside the folder"):
        PeftModel.from_pretrained(nets.Blocks(), tmp_path / "two", subfolder="../one")


def test_a_link_in_the_place_of_a_file_is_replaced_not_followed(tmp_path: Path):
    outside = tmp_path / "outside.txt"
    outside.write_text("mine")
    (tmp_path / "adapter").mkdir()
    for name in ("adapter_model.safetensors", "adapter_model.ckpt", "adapter_config.json"):
        (tmp_path / "adapter" / name).symlink_to(outside)
    model = adapted()
    model.save_pretrained(tmp_path / "adapter")
    assert outside.read_text() == "mine"
    assert_equal(model, PeftModel.from_pretrained(nets.Blocks(), tmp_path / "adapter"))


def test_the_cache_is_where_the_settings_say(hub: Hub):
    adapted().push_to_hub("ada/lora")
    load_peft_weights("ada/lora")
    assert list(Path(constants.HF_HUB_CACHE).rglob("adapter_model.safetensors"))
