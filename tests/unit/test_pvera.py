"""PVeRA: what it draws, when, and how it repeats."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, ops

from msft_peft import ConfigError, PveraConfig, get_peft_model
from msft_peft.backend.recompute import set_recompute
from tests import nets
from tests.cases import shake, weights_of
from tests.tolerances import array, assert_same, differ

X = Tensor(np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32))


def pvera(training: bool = True, **settings):
    ms.set_seed(5)
    config = PveraConfig(target_modules=["lin0", "lin1"], r=4, **settings)
    model = get_peft_model(nets.Dense(), config).set_train(training)
    shake(weights_of(model, "default"))
    return model


def drawn(model) -> list[np.ndarray]:
    return [array(model(X)) for _ in range(3)]


def test_it_draws_in_training_only(mode):
    model = pvera()
    first, second, _ = drawn(model)
    assert differ(first, second)
    model.set_train(False)
    first, second, _ = drawn(model)
    assert_same(first, second, "exact")
    model.set_train(True)
    assert differ(*drawn(model)[:2])


def test_it_draws_in_evaluation_where_that_is_asked_for(mode):
    model = pvera(False, sample_at_inference=True)
    assert differ(*drawn(model)[:2])
    # What is merged, and what other rows' adapters are beside, is the mean.
    merged = array(model.merge_and_unload()(X))
    assert_same(merged, pvera(False)(X))


@pytest.mark.parametrize("seed", [-3, 2**63])
def test_a_seed_makes_the_draws_repeat(mode, seed):
    passes = drawn(pvera(generator_seed=seed))
    assert differ(passes[0], passes[1])
    assert differ(passes[1], passes[2])
    ms.set_seed(99)
    for again, before in zip(drawn(pvera(generator_seed=seed)), passes):
        assert_same(again, before, "exact")
    assert differ(drawn(pvera(generator_seed=seed + 1))[0], passes[0])


@pytest.mark.parametrize("seed", [None, 7])
def test_a_repeated_pass_draws_the_same(seed):
    """Gradient checkpointing: the output says what was drawn on the way forward, its gradient what on the way back."""
    model = pvera(generator_seed=seed)
    layer = model.base_model.model.lin0
    weight = layer.pvera_lambda_b["default"]

    def gradient_and_update():
        grad = ms.value_and_grad(lambda x: ops.sum(layer(x)), None, [weight])
        total, (g,) = grad(X)
        return array(total), array(g)

    base = array(ops.sum(layer.base_layer(X)))
    set_recompute(layer, True)
    for _ in range(3):
        total, g = gradient_and_update()
        # The update is linear in b.
        assert_same(np.float32(total - base), np.float32((g * array(weight)).sum()))


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 0},
        {"pvera_dropout": 1.0},
        {"d_initial": float("nan")},
        {"projection_prng_key": "x"},
        {"generator_seed": 2**64},
        {"generator_seed": True},
    ],
    ids=str,
)
def test_what_it_refuses(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        PveraConfig(**settings)
    with pytest.raises(NotImplementedError, match="vera_only"):
        PveraConfig(bias="vera_only")
