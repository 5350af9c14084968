"""An adapter may be called like a part of a layer's path, or of another adapter's name, or of a file's key."""

from pathlib import Path

import pytest
import safetensors.numpy

from msft_peft import PeftModel
from tests.cases import KINDS, Case, block_cases, fixed_of, output, shake
from tests.tolerances import assert_same

# Parts of `base_model.model.layers.0.attn.q.base_layer.weight` and of what LoRA and its kin add to it.
NAMES = (
    "0 1 lora lora_ lora_A layers attn self_attn q v weight bias base_layer base_model model adapters active scaling "
    "site op default_ defaul default-2 modules_to_save original_module -x _ A X9"
).split()

# All names where weights stand at their layers alone and where they are shared; some for every method.
named = pytest.mark.parametrize(
    ("nested", "name"),
    [
        pytest.param(case, name, id=f"{case.note}-{name}")
        for case in block_cases()
        for name in (NAMES if case.method.name in ("LORA", "VERA") else ("lora_A", "base_layer", "defaul"))
    ],
)


def with_another(case: Case, name: str) -> tuple[PeftModel, PeftModel]:
    """A model with "default" and an adapter of this name, each with its own numbers; and one with "default" only."""
    model, plain = case.adapted(), case.adapted()
    own = {id(p) for p in model.get_parameters()}
    model.add_adapter(name, case.config())
    own |= {id(p) for p in fixed_of(model)}
    shake((p for p in model.get_parameters() if id(p) not in own), seed=2)
    return model, plain


@named
def test_a_name_that_occurs_elsewhere_is_harmless(nested: Case, name: str, tmp_path: Path):
    model, plain = with_another(nested, name)
    alone = output(plain)
    assert_same(output(model), alone, "exact")
    names = [p.name for p in model.get_parameters()]
    assert len(set(names)) == len(names)

    # HF loses tensors here: it drops keys that contain the name of another adapter.
    model.save_pretrained(tmp_path / "both")
    plain.save_pretrained(tmp_path / "plain")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "both" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
    other = safetensors.numpy.load_file(tmp_path / "both" / name / "adapter_model.safetensors")
    assert set(other) == set(safetensors.numpy.load_file(tmp_path / "plain" / "adapter_model.safetensors"))

    model.set_adapter(name)
    theirs = output(model)
    loaded = PeftModel.from_pretrained(nested.base(), tmp_path / "both" / name, adapter_name=name)
    assert_same(output(loaded), theirs, "exact")
    (tmp_path / "both" / name / "adapter_model.safetensors").unlink()
    for again in (name, "default"):
        loaded = PeftModel.from_pretrained(nested.base(), tmp_path / "both" / name, adapter_name=again)
        assert_same(output(loaded), theirs, "exact")
    model.delete_adapter("default")
    assert_same(output(model), theirs, "exact")


@named
def test_deleting_such_an_adapter_takes_its_own_weights_only(nested: Case, name: str):
    model, plain = with_another(nested, name)
    model.delete_adapter(name)
    assert [p.name for p in model.get_parameters()] == [p.name for p in plain.get_parameters()]
    assert [p.requires_grad for p in model.get_parameters()] == [p.requires_grad for p in plain.get_parameters()]
    assert_same(output(model), output(plain), "exact")


@pytest.mark.graph
@pytest.mark.parametrize(
    ("nested", "name"),
    [
        pytest.param(case, name, id=f"{case.note}-{name}")
        for case in block_cases()
        for name in (["0", "lora_A", "self_attn", "weight", "default-2"] if case.method.name in KINDS else ["lora_A"])
    ],
)
def test_such_a_name_compiles(nested: Case, name: str):
    import mindspore as ms

    model, _ = with_another(nested, name)
    model.set_adapter(name)
    expected = output(model)
    ms.set_context(mode=ms.GRAPH_MODE)
    assert_same(model(model.sample()), expected)
