"""Each method but LoRA against HF peft: its usual targets, and two adapters on one net."""

import numpy as np
import peft
import pytest
import torch
from peft.tuners.adaption_prompt.config import TRANSFORMERS_MODEL_CONFIG
from peft.utils import constants

from msft_peft import PeftModel
from msft_peft.registry import METHODS

from . import ours, theirs
from .cases import METHOD_CASES, same
from .test_live import half_cell

# Some name the table otherwise than the method.
TABLES = {"LN_TUNING": "LNTUNING"}
USUAL = {
    name: getattr(constants, f"TRANSFORMERS_MODELS_TO_{TABLES.get(name, name)}_TARGET_MODULES_MAPPING", None)
    for name in METHODS
}
FIRST = {case.method: case for case in reversed(METHOD_CASES.values())}
# Two adapters cannot both train the base model's biases.
UNBIASED = {case.method: case for case in reversed(METHOD_CASES.values()) if "bias" not in case.config}


def in_order(table):
    return {key: sorted(value) if isinstance(value, list) else value for key, value in table.items()}


@pytest.mark.parametrize("name", sorted(name for name, table in USUAL.items() if table is not None))
def test_the_usual_targets_are_hfs(name):
    assert in_order(METHODS[name].default_targets) == in_order(USUAL[name])


def test_what_has_no_table_in_hf_has_none_here():
    """Prompt methods work in no layers, tokens are in the input embedding, and three methods HF does not have."""
    without = {name: METHODS[name] for name, table in USUAL.items() if table is None and name != "ADAPTION_PROMPT"}
    assert not any(method.default_targets for method in without.values())
    layered = {name for name, method in without.items() if method.prompt is None}
    assert layered == {"BITFIT", "BOTTLENECK_ADAPTER", "LOW_RANK_ADAPTER", "TRAINABLE_TOKENS"}
    assert all(METHODS[name].find_targets is not None for name in layered)


def test_adaption_prompts_know_hfs_attentions():
    ours = METHODS["ADAPTION_PROMPT"].default_targets
    assert {key: ours[key] for key in TRANSFORMERS_MODEL_CONFIG} == {
        key: [known.target_modules] for key, known in TRANSFORMERS_MODEL_CONFIG.items()
    }


@pytest.mark.parametrize("case", UNBIASED.values(), ids=UNBIASED)
def test_two_adapters(case, mode, tmp_path):
    """Both in one model, each alone: HF's numbers, and those of its file."""
    weights, x, _ = theirs.data(case, 3)
    expected = {}
    for seed, name in enumerate(("one", "two")):
        hf = theirs.create(case, weights, seed, name)
        hf.save_pretrained(tmp_path)
        with torch.no_grad():
            expected[name] = theirs.forward(hf, x).numpy()
    assert not np.allclose(expected["one"], expected["two"], atol=1e-3)
    hf = peft.PeftModel.from_pretrained(theirs.build(case.net, weights), tmp_path / "one", adapter_name="one").eval()
    hf.load_adapter(tmp_path / "two", "two")
    mine = PeftModel.from_pretrained(ours.build(case.net, weights), tmp_path / "one", adapter_name="one")
    mine.load_adapter(tmp_path / "two", "two")
    for name in ("two", "one"):
        hf.set_adapter(name)
        mine.set_adapter(name)
        y = mine(ours.ms.Tensor(x)).asnumpy()
        same("output", y, expected[name], name)
        with torch.no_grad():
            same("output", y, theirs.forward(hf, x).numpy(), f"{name} in HF")


EXACT = [case for case in METHOD_CASES.values() if case.name == "oft_linear_exact"]


@pytest.mark.parametrize("autocast", [True, False], ids=["float32 adapter", "float16 adapter"])
@pytest.mark.parametrize("case", [*FIRST.values(), *EXACT], ids=lambda case: case.name)
def test_a_float16_base(case, autocast, tmp_path):
    """The output, and the dtypes in files."""
    weights, x, _ = theirs.data(case, 1)
    theirs.create(case, weights, 1).save_pretrained(tmp_path)
    module = theirs.build(case.net, weights).half()
    hf = peft.PeftModel.from_pretrained(module, tmp_path, autocast_adapter_dtype=autocast).eval()
    batch = x if x.dtype == np.int32 else x.astype(np.float16)
    mine = PeftModel.from_pretrained(
        half_cell(case.net, weights, ours.ms.float16), tmp_path, autocast_adapter_dtype=autocast
    )
    y = mine(ours.ms.Tensor(batch))
    assert y.dtype == ours.ms.float16
    with torch.no_grad():
        same("half", y.asnumpy().astype(np.float32), theirs.forward(hf, batch).float().numpy())
    hf.save_pretrained(tmp_path / "theirs")
    mine.save_pretrained(tmp_path / "ours")
    read = [ours.tensors_of(tmp_path / who / "adapter_model.safetensors")[0] for who in ("ours", "theirs")]
    assert {k: v[:2] for k, v in read[0].items()} == {k: v[:2] for k, v in ours.without_copies(read[1]).items()}
