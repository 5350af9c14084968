"""`add_weighted_adapter` against HF peft, live: the same adapters, combined on both sides."""

import warnings
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.utils import merge_utils

import msft_peft
from msft_peft.tuners.lora import combine as arithmetic

from . import ours, theirs
from .cases import CASES, make_weight, same, same_dicts

WEIGHTS = {"a": 0.7, "b": -0.4, "c": 1.3}
ALPHAS = {"a": 6, "b": 1.5, "c": 4}
# Random dropping is compared with both libraries' masks fixed.
TYPES = {
    "linear": {},
    "cat": {},
    "svd": {},
    "ties": {"density": 0.4},
    "ties by head": {"density": 0.4, "majority_sign_method": "frequency"},
    "ties_svd": {"density": 0.6},
    "dare_ties": {"density": 0.6},
    "dare_linear": {"density": 0.6},
    "dare_ties_svd": {"density": 0.6},
    "dare_linear_svd": {"density": 0.6, "svd_rank": 2},
    "magnitude_prune": {"density": 0.3},
    "magnitude_prune_svd": {"density": 0.5, "svd_full_matrices": False},
}


def pair(name: str, tmp_path: Path) -> tuple[PeftModel, msft_peft.PeftModel, np.ndarray]:
    """Three adapters in both libraries, with equal random weights; and a batch."""
    case = CASES[name]
    weights, x, _ = theirs.data(case)
    hf = None
    for adapter, alpha in ALPHAS.items():
        config = LoraConfig(**case.config | {"lora_alpha": alpha, "r": 3})
        if hf is None:
            hf = PeftModel(theirs.build(case.net, weights), config, adapter_name=adapter)
        else:
            hf.add_adapter(adapter, config)
    rng = case.rng(1)
    for key, p in hf.named_parameters():
        if "lora_" in key:
            p.data = torch.tensor(make_weight(key, tuple(p.shape), rng))
    hf.eval()
    hf.save_pretrained(tmp_path)
    mine = msft_peft.PeftModel.from_pretrained(
        ours.build(case.net, weights), tmp_path / "a", adapter_name="a", is_trainable=True
    )
    for adapter in ("b", "c"):
        mine.load_adapter(tmp_path / adapter, adapter)
    return hf, mine.set_train(False), x


def fix_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same random numbers in both libraries for a tensor, also if one of them has it flat or transposed."""

    def uniform(shape: tuple[int, ...]) -> np.ndarray:
        sides = (shape[0], int(np.prod(shape[1:])))
        numbers = np.random.default_rng(sorted(sides)).random((min(sides), max(sides)))
        return (numbers if sides[0] <= sides[1] else numbers.T).reshape(shape)

    monkeypatch.setattr(torch, "bernoulli", lambda p, **_: torch.tensor(uniform(p.shape)).lt(p).to(p.dtype))
    monkeypatch.setattr(arithmetic.np.random, "random", uniform)


# An SVD of a Conv1d is wrong in HF, which takes one for each output channel: see the unit tests for ours.
ALL = [
    (name, label)
    for name in ("linear", "linear_patterns", "embedding", "conv1d", "conv2d", "hf_conv1d")
    for label in TYPES
    if not (name == "conv1d" and "svd" in label)
]


@pytest.mark.parametrize(("name", "label"), ALL)
def test_the_same_combination(name: str, label: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hf, mine, x = pair(name, tmp_path / "parts")
    fix_masks(monkeypatch)
    kind = label.partition(" ")[0]
    outcomes = []
    for model in (hf, mine):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "new", kind, **TYPES[label])
        model.set_adapter("new")
        config = model.peft_config["new"]
        names = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "bias")
        outcomes.append({name: getattr(config, name) for name in names} | {"targets": sorted(config.target_modules)})
    assert outcomes[0] == outcomes[1]
    with torch.no_grad():
        expected = theirs.forward(hf, x).numpy()
    same("output", mine(ours.ms.Tensor(x)).asnumpy(), expected)
    # Where a layer has a rank of its own, the shapes of HF's tensors belie its config, so that it cannot load them.
    if "svd" not in kind and name != "linear_patterns":
        saved = []
        for who, model in (("hf", hf), ("ours", mine)):
            model.save_pretrained(tmp_path / who, selected_adapters=["new"])
            saved.append(ours.arrays_of(tmp_path / who / "new" / "adapter_model.safetensors"))
        same_dicts("weight", saved[1], saved[0])


def test_the_same_clamp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Where the factors are cut off depends on their signs, which an SVD leaves open: so both take torch's."""
    hf, mine, x = pair("linear", tmp_path)

    def svd(matrix: np.ndarray, full_matrices: bool) -> list[np.ndarray]:
        return [part.numpy() for part in torch.linalg.svd(torch.tensor(matrix), full_matrices=full_matrices)]

    monkeypatch.setattr(arithmetic.np.linalg, "svd", svd)
    for model in (hf, mine):
        model.add_weighted_adapter(["a", "b"], [0.7, -0.4], "new", svd_clamp=0.8)
        model.set_adapter("new")
    with torch.no_grad():
        same("output", mine(ours.ms.Tensor(x)).asnumpy(), theirs.forward(hf, x).numpy())


def test_hf_opens_the_result(tmp_path: Path):
    _, mine, x = pair("linear", tmp_path / "parts")
    mine.add_weighted_adapter(["a", "b"], [0.7, -0.4], "new", "svd", svd_rank=2)
    mine.set_adapter("new")
    mine.save_pretrained(tmp_path / "out", selected_adapters=["new"])
    weights, _, _ = theirs.data(CASES["linear"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hf = PeftModel.from_pretrained(theirs.build("mlp", weights), tmp_path / "out" / "new").eval()
    with torch.no_grad():
        same("output", mine(ours.ms.Tensor(x)).asnumpy(), theirs.forward(hf, x).numpy())


BAD = {
    "Adapter zz does not exist": ({}, {}, ["a", "zz"], {}),
    "All adapters must have the same r value": ({}, {"r": 2}, ["a", "b"], {"combination_type": "linear"}),
    "should follow the same target modules type": ({}, {"target_modules": "lin0"}, ["a", "b"], {}),
    r"same module with modules_to_save, but found 1 such instance\(s\)": (
        {"modules_to_save": ["norm"]},
        {"modules_to_save": ["norm"]},
        ["a", "b"],
        {},
    ),
    "Density should be >= 0, got -1": ({}, {}, ["a", "b"], {"combination_type": "ties", "density": -1}),
    "Invalid combination_type: foo": ({}, {}, ["a", "b"], {"combination_type": "foo"}),
    "set bias to 'none' for all adapters": ({"bias": "all"}, None, ["a"], {}),
}


@pytest.mark.parametrize("says", BAD)
def test_the_same_refusals(says: str):
    one, other, adapters, arguments = BAD[says]
    weights, _, _ = theirs.data(CASES["linear"])
    for lib, side in ((peft, theirs), (msft_peft, ours)):
        config = {"r": 4, "target_modules": ["lin0"]}
        model = lib.PeftModel(side.build("mlp", weights), lib.LoraConfig(**config | one), adapter_name="a")
        if other is not None:
            model.add_adapter("b", lib.LoraConfig(**config | other))
        with pytest.raises(ValueError, match=says):
            model.add_weighted_adapter(adapters, [1.0] * len(adapters), "new", **arguments)


FUNCTIONS = {
    "task_arithmetic": {},
    "magnitude_prune": {"density": 0.3},
    "ties": {"density": 0.4},
    "dare_linear": {"density": 0.7},
    "dare_ties": {"density": 0.7, "majority_sign_method": "frequency"},
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_same_functions(name: str, monkeypatch: pytest.MonkeyPatch):
    fix_masks(monkeypatch)
    rng = np.random.default_rng(3)
    tensors = [rng.standard_normal((4, 3, 5)).astype(np.float32) for _ in range(3)]
    weights = np.array([0.5, -1.5, 2], np.float32)
    expected = getattr(merge_utils, name)([torch.tensor(t) for t in tensors], torch.tensor(weights), **FUNCTIONS[name])
    same("weight", getattr(arithmetic, name)(tensors, weights, **FUNCTIONS[name]), expected.numpy())


@pytest.mark.parametrize("method", ["total", "frequency"])
def test_the_same_elections(method: str):
    votes = np.random.default_rng(3).integers(-2, 3, (4, 50)).astype(np.float32)
    tensor = torch.tensor(votes)
    mask = arithmetic.calculate_majority_sign_mask(votes, method)
    hf_mask = merge_utils.calculate_majority_sign_mask(tensor, method)
    assert (mask == hf_mask.numpy()).all()
    same("weight", arithmetic.disjoint_merge(votes, mask), merge_utils.disjoint_merge(tensor, hf_mask).numpy())
    pruned = merge_utils.prune(tensor[0] + torch.arange(50) / 64, 0.3, "magnitude").numpy()
    same("weight", arithmetic.prune(votes[0] + np.arange(50, dtype=np.float32) / 64, 0.3, "magnitude"), pruned)
    shaped = merge_utils.reshape_weight_task_tensors(tensor, torch.ones(4)).shape
    assert arithmetic.reshape_weight_task_tensors(votes, np.ones(4)).shape == tuple(shaped)
