"""Each method but LoRA (test_live_init.py) against HF peft: what is random in it, when it is fresh and in training."""

import contextlib
import warnings
from dataclasses import dataclass
from typing import Any

import mindspore as ms
import numpy as np
import peft
import pytest
import torch
from mindspore import nn

import msft_peft

from . import ours
from .test_live_init import Held, Holder, distance

INPUTS, OUTPUTS, TOKENS = 192, 256, 60
LAYERS = {
    "dense": (lambda: torch.nn.Linear(INPUTS, OUTPUTS), lambda: nn.Dense(INPUTS, OUTPUTS)),
    "tall": (lambda: torch.nn.Linear(OUTPUTS, INPUTS), lambda: nn.Dense(OUTPUTS, INPUTS)),
    "small": (lambda: torch.nn.Linear(8, 12), lambda: nn.Dense(8, 12)),
    "embedding": (lambda: torch.nn.Embedding(TOKENS, INPUTS), lambda: nn.Embedding(TOKENS, INPUTS)),
    "conv2d": (lambda: torch.nn.Conv2d(24, 32, 3), lambda: nn.Conv2d(24, 32, 3, has_bias=True)),
}


@dataclass(frozen=True)
class Fresh:
    """A config of a method, and the kind of layer that it is for."""

    method: str
    settings: dict[str, Any]
    kind: str = "dense"

    def __str__(self) -> str:
        said = "-".join(f"{key}={value}" for key, value in self.settings.items())
        return f"{self.method}-{self.kind}-{said}"

    def config(self, library: Any) -> Any:
        return getattr(library, f"{self.method}Config")(target_modules=["layer"], **self.settings)


def each(method: str, *values: Any, kinds: tuple[str, ...] = ("dense",), field: str = "init_weights", **settings: Any):
    return [Fresh(method, settings | {field: value}, kind) for kind in kinds for value in values]


EFFECTIVE = {"kinds": ("conv2d",), "use_effective_conv2d": True, "r": 3}
FRESH = [
    *each("IA3", True, False, field="init_ia3_weights", feedforward_modules=[]),
    *each("LoHa", True, False, kinds=("dense", "conv2d"), r=12),
    *each("LoHa", True, False, **EFFECTIVE),
    *each("LoKr", True, False, "lycoris", kinds=("dense", "conv2d"), r=7),
    *each("LoKr", True, False, "lycoris", r=7, decompose_both=True, decompose_factor=16),
    *each("LoKr", True, False, "lycoris", **EFFECTIVE | {"r": 3}),
    *each("Hira", True, False, kinds=("dense", "embedding", "conv2d"), r=12),
    *each("OFT", True, False, kinds=("dense", "embedding"), oft_block_size=8),
    *each("HRA", True, False, kinds=("dense", "conv2d"), r=12),
    *each("Miss", True, False, "bat", r=8),
    *each("Miss", "mini", r=8, mini_r=4),
    *each("Gralora", True, False, kinds=("dense", "tall"), r=8, gralora_k=2, hybrid_r=4),
    *each("Vera", True, False, r=96),
    *each("Vera", 0.5, field="d_initial", r=12),
    *each("Pvera", True, False, r=96),
    *each("Pvera", 0.5, field="d_initial", r=12),
    *each("UniLora", True, False, kinds=("dense", "tall"), theta_d_length=600),
    *each("UniLora", 0.5, field="init_theta_d_bound", save_indices=True, theta_d_length=60),
    *each("Lily", True, False, kinds=("dense", "tall"), r=24, stride_A=2),
    *each("AdaLora", True, kinds=("conv2d",), field="init_lora_weights", init_r=96, total_step=9),
    *each("AdaLora", True, False, field="init_lora_weights", init_r=96, total_step=9),
    *each("Shira", True, False, r=4, random_seed=1),
    *each("Road", True, False, group_size=8),
    *each("Road", False, group_size=8, variant="road_2"),
    *each("Road", False, group_size=8, variant="road_4"),
    *each("C3A", True, False, "gaussian", "kaiming_uniform", "xavier_uniform", kinds=("dense", "tall"), block_size=8),
    *each("VBLoRA", 0.1, 0.3, field="init_logits_std", num_vectors=40, vector_length=16, r=3),
    *each("VBLoRA", 0.05, field="init_vector_bank_bound", num_vectors=40, vector_length=16, r=3),
    *each("FourierFT", True, False, n_frequency=500),
    *each("WaveFT", True, False, n_frequency=500, wavelet_family="sym4"),
    *each("OSF", False, kinds=("dense", "tall")),
    *each("RandLora", True, False, kinds=("dense", "tall"), r=24),
    *each("BOFT", True, False, boft_block_size=4),
    *each("BOFT", True, kinds=("conv2d",), boft_block_size=4),
    *each("Delora", True, False, r=12),
    Fresh("LNTuning", {}),
    *each("TrainableTokens", True, False, kinds=("embedding",), token_indices=list(range(20))),
]
# Layers in a model, each of which draws; and so many numbers of a weight are compared that the spread of each side is
# known to about one part in a hundred.
ALIKE, ENOUGH, MOST_DRAWS = 4, 8_000, 40


@contextlib.contextmanager
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what HF says of its own configs
        yield


def by_weight(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One array for each weight that layers have, theirs in turn; shared ones as they are."""
    found: dict[str, list[np.ndarray]] = {}
    for key, value in sorted(tensors.items()):
        found.setdefault(key.rpartition("layer.")[2], []).append(value)
    return {key: np.stack(values) for key, values in found.items()}


def theirs(case: Fresh) -> dict[str, np.ndarray]:
    model = torch.nn.Sequential(*(Holder(LAYERS[case.kind][0]()) for _ in range(ALIKE)))
    for p in model.parameters():
        p.data.fill_(0.5)
    model = peft.get_peft_model(model, case.config(peft))
    tensors = peft.get_peft_model_state_dict(model)
    # So are Lily's factors, at each layer that shares them.
    own = {p.data_ptr(): key for key, p in reversed(tensors.items()) if "lily_" in key}
    found = by_weight({k: p.numpy().copy() for k, p in tensors.items() if own.get(p.data_ptr(), k) == k})
    # RandLoRA's random matrices are at each layer again.
    return {key: value for key, value in found.items() if f"base_model.{key}" not in found}


def mine(case: Fresh) -> dict[str, np.ndarray]:
    model = nn.SequentialCell(*(Held(LAYERS[case.kind][1]()) for _ in range(ALIKE)))
    for p in model.get_parameters():
        ours.fill(p, 0.5)
    model = msft_peft.get_peft_model(model, case.config(msft_peft))
    return by_weight({key: p.asnumpy().copy() for key, p in msft_peft.get_peft_model_state_dict(model).items()})


def check_alike(a: np.ndarray, b: np.ndarray, what: str) -> None:
    """Two samples of one distribution: its shape, spread and middle."""
    what += f": mean {a.mean()} and std {a.std()}, HF has {b.mean()} and {b.std()}"
    assert distance(a, b) < 2.5, what
    assert a.std() == pytest.approx(b.std(), rel=0.05), what
    assert abs(a.mean() - b.mean()) < 6 * b.std() / np.sqrt(b.size), what
    assert np.abs(a).max() == pytest.approx(np.abs(b).max(), rel=0.3), what


@pytest.mark.parametrize("case", FRESH, ids=str)
def test_fresh_weights_are_drawn_from_hf_s_distributions(case):
    """What is the same in each draw (zeros, ones, the base's own numbers) is the same in both libraries."""
    torch.manual_seed(0)
    with quiet():
        first, second = theirs(case), theirs(case)
        drawn = [key for key in first if not np.array_equal(first[key], second[key])]
        least = min((first[key].size for key in drawn), default=ENOUGH)
        draws = range(min(-(-ENOUGH // least) + 1, MOST_DRAWS))
        hf, found = [theirs(case) for _ in draws], [mine(case) for _ in draws]
    assert sorted(found[0]) == sorted(hf[0])
    for key in hf[0]:
        a, b = (np.stack([draw[key] for draw in side]) for side in (found, hf))
        assert a.shape == b.shape
        if key in drawn:
            check_alike(a, b, key)
            assert not np.allclose(a[0], a[1]), "each draw is a new one"
        else:
            np.testing.assert_allclose(a, b, rtol=1e-6, err_msg=key)


@pytest.mark.parametrize("draw", [np.random.Generator.standard_normal, np.random.Generator.random])
def test_a_tenth_too_much_is_seen(draw):
    rng = np.random.default_rng(0)
    a, b = draw(rng, ENOUGH) - 0.5, draw(rng, ENOUGH) - 0.5
    check_alike(a, b, "as it should be")
    for wrong in (1.1 * a, 0.9 * a, a + 0.1, np.sign(a) * a.std()):
        with pytest.raises(AssertionError):
            check_alike(wrong, b, "not")


# --- dropout -------------------------------------------------------------------------------------------------------

SHARE = 0.3
# Each drops inputs of the update, one by one.
OF_INPUTS = [
    Fresh("Hira", {"r": 4, "hira_dropout": SHARE, "init_weights": False}),
    Fresh("Miss", {"r": 8, "miss_dropout": SHARE, "init_weights": False}),
    Fresh("Gralora", {"r": 4, "gralora_dropout": SHARE, "init_weights": False}),
    Fresh("Vera", {"r": 4, "vera_dropout": SHARE, "init_weights": False}),
    Fresh("RandLora", {"r": 48, "randlora_dropout": SHARE, "init_weights": False}),
    Fresh("VBLoRA", {"vblora_dropout": SHARE, "num_vectors": 40, "vector_length": 16, "init_vector_bank_bound": 1.0}),
    Fresh("UniLora", {"unilora_dropout": SHARE, "init_weights": False}),
    Fresh("TinyLora", {"tinylora_dropout": SHARE, "init_weights": "uniform", "init_v_bound": 1.0}),
    Fresh("AdaLora", {"lora_dropout": SHARE, "init_lora_weights": False, "total_step": 9}),
    Fresh("Delora", {"r": 4, "module_dropout": SHARE, "init_weights": False}),
]
ROWS = 10_000


def hf_twin(case: Fresh) -> peft.PeftModel:
    torch.manual_seed(0)
    return peft.get_peft_model(Holder(LAYERS[case.kind][0]()), case.config(peft))


def our_twin(case: Fresh, hf: peft.PeftModel, folder: Any) -> msft_peft.PeftModel:
    """The same layer with the same adapter, and its weights are those that HF drew."""
    layer = LAYERS[case.kind][1]()
    base = {key.rpartition(".")[2]: p for key, p in hf.named_parameters() if ".base_layer." in key}
    for name, p in layer.parameters_and_names():
        p.copy_(ms.Tensor(base[name].detach().numpy()))
    hf.save_pretrained(folder)
    return msft_peft.PeftModel.from_pretrained(Held(layer), folder, is_trainable=True)


def updates(model: Any, x: np.ndarray, training: bool, times: int = 1) -> np.ndarray:
    """What the adapter adds to the layer's outputs, each time anew: (times, ...)."""
    if isinstance(model, torch.nn.Module):
        model.train(training)
        with torch.no_grad():
            with model.disable_adapter():
                base = model(torch.tensor(x))
            return np.stack([(model(torch.tensor(x)) - base).numpy() for _ in range(times)])
    model.set_train(training)
    with model.disable_adapter():
        base = model(ms.Tensor(x))
    return np.stack([(model(ms.Tensor(x)) - base).asnumpy() for _ in range(times)])


@pytest.mark.parametrize("case", OF_INPUTS, ids=str)
def test_inputs_are_dropped_as_often_as_in_hf(case, tmp_path):
    """Of one input alone: the update is there, larger by what is left out, or it is zero."""
    with quiet():
        hf = hf_twin(case)
        mine = our_twin(case, hf, tmp_path)
    x = np.zeros((ROWS // 10, 10, INPUTS), np.float32)
    x[..., 7] = 1.5
    steady = updates(mine, x[:1, :1], False)
    seen = np.abs(steady) > 0.1 * np.abs(steady).max()
    for model in (hf, mine):
        share = (updates(model, x, True) / np.where(seen, steady, 1))[..., seen[0, 0, 0]]
        kept = np.abs(share).max(-1) > 0.5
        assert 1 - kept.mean() == pytest.approx(SHARE, abs=0.018)
        np.testing.assert_allclose(share[kept], 1 / (1 - SHARE), rtol=2e-3)
        np.testing.assert_allclose(share[~kept], 0, atol=2e-3)
        np.testing.assert_allclose(updates(model, x[:9], False)[0], np.tile(steady[0], (9, 10, 1)), atol=1e-5)


# Each drops rows of the update's weight, or all of it, once a step.
OF_UPDATES = [
    *each("LoHa", SHARE, field="rank_dropout", r=4, init_weights=False),
    *each("LoKr", SHARE, field="rank_dropout", r=4, init_weights=False),
    *each("LoKr", SHARE, field="rank_dropout", r=4, init_weights=False, rank_dropout_scale=True),
    *each("LoHa", SHARE, kinds=("small",), field="module_dropout", r=2, init_weights=False),
    *each("LoKr", SHARE, kinds=("small",), field="module_dropout", r=2, init_weights=False),
]


@pytest.mark.parametrize("case", OF_UPDATES, ids=str)
def test_updates_are_dropped_as_often_as_in_hf(case, tmp_path):
    """Rows that are left may count for those that are not; an update that is left counts as it is."""
    with quiet():
        hf = hf_twin(case)
        mine = our_twin(case, hf, tmp_path)
    rows, makes_up = "rank_dropout" in case.settings, case.method == "LoHa" or "rank_dropout_scale" in case.settings
    width = LAYERS[case.kind][0]().in_features
    x = np.random.default_rng(0).normal(size=(1, width)).astype(np.float32)
    steady = updates(mine, x, False)
    np.testing.assert_allclose(steady, updates(hf, x, False), atol=1e-5)
    seen = np.abs(steady[0, 0]) > 0.1 * np.abs(steady).max()
    for model in (hf, mine):
        steps = 60 if rows else 300
        share = (updates(model, x, True, steps) / np.where(seen, steady, 1))[:, 0, seen]
        kept = np.abs(share) > 0.5
        assert kept.any(1).mean() == pytest.approx(1.0 if rows else 1 - SHARE, abs=0.09)
        assert rows or (kept.all(1) == kept.any(1)).all()
        assert 1 - kept.mean() == pytest.approx(SHARE, abs=0.02 if rows else 0.09)
        np.testing.assert_allclose(share[~kept], 0, atol=1e-3)
        # Of all rows, seen or not, some other share may be left.
        wanted = 1 / (1 - SHARE) if rows and makes_up else 1.0
        np.testing.assert_allclose(share[kept], wanted, rtol=0.25 if wanted != 1 else 1e-3)
        assert share[kept].mean() == pytest.approx(wanted, rel=0.03)


# --- hidden values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_pvera_s_updates_are_drawn_from_hf_s_distributions(training, tmp_path):
    """Each output of many draws has HF's mean and spread; those of one draw hang together as in HF."""
    case = Fresh("Pvera", {"r": 6, "init_weights": False, "sample_at_inference": not training})
    ms.set_seed(3)
    with quiet():
        hf = hf_twin(case)
        for key, p in hf.named_parameters():
            if "lambda_d" in key:
                p.data.mul_(0.2)
        mine = our_twin(case, hf, tmp_path)
    x = np.tile(0.1 * np.random.default_rng(0).normal(size=INPUTS).astype(np.float32), (ROWS, 1))
    found, wanted = (updates(model, x, training)[0] for model in (mine, hf))
    spread = wanted.std(0)
    assert spread.min() > 0.01
    # The error of a mean, and of a difference of two, is known.
    np.testing.assert_array_less(np.abs(found.mean(0) - wanted.mean(0)), 6 * spread / np.sqrt(ROWS / 2))
    np.testing.assert_allclose(found.std(0), spread, rtol=0.06)
    alike = np.corrcoef(found, rowvar=False) - np.corrcoef(wanted, rowvar=False)
    assert np.abs(alike).max() < 0.1
    # Row by row, and pass by pass, other numbers.
    assert np.abs(np.corrcoef(found[:-1, 0], found[1:, 0])[0, 1]) < 0.05
    assert np.abs(np.corrcoef(found[:, 0], updates(mine, x, training)[0][:, 0])[0, 1]) < 0.05
