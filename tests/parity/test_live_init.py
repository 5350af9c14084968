"""What is random, against HF peft, live: the distributions of fresh weights, and of dropout."""

import mindspore as ms
import numpy as np
import peft
import pytest
import torch
from mindspore import nn

import msft_peft

LAYERS = {
    "linear": (lambda: torch.nn.Linear(48, 40), lambda: nn.Dense(48, 40)),
    "embedding": (lambda: torch.nn.Embedding(50, 60), lambda: nn.Embedding(50, 60)),
    "conv1d": (lambda: torch.nn.Conv1d(12, 20, 5), lambda: nn.Conv1d(12, 20, 5, has_bias=True)),
    "conv2d": (lambda: torch.nn.Conv2d(8, 20, 3), lambda: nn.Conv2d(8, 20, 3, has_bias=True)),
    "conv2d_groups": (
        lambda: torch.nn.Conv2d(8, 20, 3, groups=4),
        lambda: nn.Conv2d(8, 20, 3, group=4, has_bias=True),
    ),
    "conv3d": (lambda: torch.nn.Conv3d(6, 20, 2), lambda: nn.Conv3d(6, 20, 2, has_bias=True)),
}
RANK = 24


class Holder(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


class Held(nn.Cell):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def construct(self, x):
        return self.layer(x)


def hf_model(kind: str, **config):
    return peft.get_peft_model(Holder(LAYERS[kind][0]()), peft.LoraConfig(target_modules=["layer"], **config))


def our_model(kind: str, **config):
    return msft_peft.get_peft_model(Held(LAYERS[kind][1]()), msft_peft.LoraConfig(target_modules=["layer"], **config))


def hf_draw(kind: str, init) -> dict[str, np.ndarray]:
    model = hf_model(kind, r=RANK, init_lora_weights=init)
    return {key.split(".")[3]: p.detach().numpy() for key, p in model.named_parameters() if p.requires_grad}


def our_draw(kind: str, init) -> dict[str, np.ndarray]:
    model = our_model(kind, r=RANK, init_lora_weights=init)
    return {p.name.split(".")[3]: p.asnumpy().copy() for p in model.trainable_params()}


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Kolmogorov and Smirnov's: the largest difference of the two distribution functions, in units of its scale."""
    a, b = np.sort(a.ravel()), np.sort(b.ravel())
    where = np.concatenate([a, b])
    gap = np.abs(np.searchsorted(a, where, "right") / a.size - np.searchsorted(b, where, "right") / b.size).max()
    return gap / np.sqrt(1 / a.size + 1 / b.size)


@pytest.mark.parametrize("init", [True, False, "gaussian"])
@pytest.mark.parametrize("kind", list(LAYERS))
def test_fresh_weights_are_drawn_from_hf_s_distributions(kind, init):
    """Several draws each; zeros are zeros in both. At 2.2 chance alone fails a comparison once in 8000 times."""
    draws = 4
    torch.manual_seed(0)
    mine = [our_draw(kind, init) for _ in range(draws)]
    hf = [hf_draw(kind, init) for _ in range(draws)]
    assert sorted(mine[0]) == sorted(hf[0])
    for name in mine[0]:
        a, b = (np.stack([draw[name] for draw in side]) for side in (mine, hf))
        assert a.shape == b.shape
        if not b.any():
            assert not a.any(), name
            continue
        assert distance(a, b) < 2.2, f"{name}: std {a.std()} against {b.std()}"
        assert np.abs(a).max() == pytest.approx(np.abs(b).max(), rel=0.02 if init is True or a.size > 9999 else 0.2)
        assert not np.allclose(a[0], a[1]), "each draw is a new one"


def test_the_distance_tells_distributions_apart():
    rng = np.random.default_rng(0)
    a = rng.normal(size=4000)
    assert distance(a, rng.normal(size=4000)) < 2.2
    assert distance(a, 1.15 * rng.normal(size=4000)) > 2.2
    assert distance(a, rng.uniform(-1.73, 1.73, size=4000)) > 2.2


def test_he_uniform_has_torch_s_bound():
    """With a = √5 it is 1/√fan_in: of A's inputs, and of B's where B is drawn too."""
    found = our_draw("conv2d_groups", False)
    for name, fan_in in (("lora_A", 8 * 9), ("lora_B", RANK // 4)):
        assert np.abs(found[name]).max() <= 1 / np.sqrt(fan_in) + 1e-6
        assert np.abs(found[name]).max() > 0.97 / np.sqrt(fan_in)


def test_the_seed_repeats_the_draw():
    ms.set_seed(5)
    first = our_draw("linear", True)["lora_A"]
    ms.set_seed(5)
    np.testing.assert_array_equal(first, our_draw("linear", True)["lora_A"])


DROPOUT, ROWS = 0.3, 6000


def test_dropout_has_hf_s_statistics(mode):
    """In training, of one row many times: each output's mean is the evaluation's, and its spread is HF's."""
    torch.manual_seed(0)
    config = {"r": RANK, "lora_dropout": DROPOUT, "init_lora_weights": False, "lora_alpha": 24}
    hf, mine = hf_model("linear", **config), our_model("linear", **config)
    weights = {key: p.detach().numpy() for key, p in hf.named_parameters()}
    for name, p in mine.parameters_and_names():
        p.copy_(ms.Tensor(weights[name]))
    row = np.random.default_rng(0).normal(size=(1, 48)).astype(np.float32)
    x = np.repeat(row, ROWS, 0)
    with torch.no_grad():
        wanted = hf.train()(torch.tensor(x)).numpy()
        steady = hf.eval()(torch.tensor(row)).numpy()
    found = mine.set_train(True)(ms.Tensor(x)).asnumpy()
    np.testing.assert_allclose(mine.set_train(False)(ms.Tensor(row)).asnumpy(), steady, atol=1e-5)
    noise = wanted.std(0) / np.sqrt(ROWS)
    assert (np.abs(found.mean(0) - steady[0]) < 5 * noise).all()
    np.testing.assert_allclose(found.std(0), wanted.std(0), rtol=0.08)
    assert found.std(0).min() > 0.01


def test_embeddings_have_no_dropout(mode):
    """Neither library drops anything of an embedding's adapter."""
    mine = our_model("embedding", r=4, lora_dropout=0.5, init_lora_weights=False)
    ids = ms.Tensor(np.arange(20, dtype=np.int32))
    kept = mine.set_train(False)(ids).asnumpy()
    np.testing.assert_array_equal(mine.set_train(True)(ids).asnumpy(), kept)
    hf = hf_model("embedding", r=4, lora_dropout=0.5, init_lora_weights=False)
    with torch.no_grad():
        assert torch.equal(hf.train()(torch.arange(20)), hf.eval()(torch.arange(20)))
