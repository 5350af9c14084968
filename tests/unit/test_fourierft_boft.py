"""What is peculiar to FourierFT and BOFT."""

import numpy as np
import pytest
from mindspore import nn

from msft_peft import BOFTConfig, FourierFTConfig, NoMatchingPeftModuleError, RandLoraConfig, get_peft_model
from tests import nets
from tests.cases import layers_of, output, shake, state_of, weights_of
from tests.tolerances import array, assert_same

BOTH = ["lin0", "lin1"]


def test_fourierft_s_update_is_a_sum_of_waves():
    """Against the definition: ΔW[u, v] = s/(out·in)·Σ_p F_p·cos(2π(i_p·u/out + j_p·v/in))."""
    model = get_peft_model(nets.Dense(), FourierFTConfig(target_modules=["lin0"], n_frequency=5, scaling=7.0))
    patch = layers_of(model)[0].adapters["default"]
    i, j = np.divmod(array(patch.places)[:, 0], 6)
    assert len({*zip(i, j)}) == 5
    u, v = np.arange(8)[:, None, None], np.arange(6)[None, :, None]
    waves = np.cos(2 * np.pi * (i * u / 8 + j * v / 6)) * array(patch.fourierft_spectrum)
    assert_same(patch.delta_weight(), (7.0 / 48 * waves.sum(-1)).astype(np.float32))


def test_fourierft_s_places_depend_on_the_seed_alone():
    def places(**settings):
        model = get_peft_model(nets.Dense(), FourierFTConfig(target_modules=["lin0"], n_frequency=9, **settings))
        return array(layers_of(model)[0].adapters["default"].places).tolist()

    assert places() == places(scaling=3.0)
    assert places() != places(random_loc_seed=778)


def test_fourierft_begins_at_zero_where_it_is_told_to():
    base = nets.Dense()
    before = output(base)
    model = get_peft_model(base, FourierFTConfig(target_modules=BOTH, n_frequency=3, init_weights=True))
    assert_same(output(model), before)


@pytest.mark.parametrize("factors", [1, 2, 3])
def test_boft_s_rotations_are_orthogonal(factors):
    config = BOFTConfig(target_modules=["lin1"], boft_block_size=2, boft_n_butterfly_factor=factors)
    model = get_peft_model(nets.Dense(), config)
    shake(weights_of(model, "default"))
    patch = layers_of(model)[0].adapters["default"]
    rotation = array(patch.before(nn.Identity()(nets.ms.Tensor(np.eye(8, dtype=np.float32)))))
    assert_same(rotation @ rotation.T, np.eye(8, dtype=np.float32))
    # Each factor doubles how many inputs an output can depend on.
    assert (np.abs(rotation) > 1e-4).sum(1).tolist() == [2**factors] * 8


@pytest.mark.parametrize(
    ("config", "settings", "error", "text"),
    [
        (FourierFTConfig, {"n_frequency": 0}, ValueError, "`n_frequency` should be a positive integer"),
        (FourierFTConfig, {"n_frequency": 49}, ValueError, "the value passed is 49 and the product is 48: at lin0"),
        (FourierFTConfig, {"n_frequency_pattern": {"lin1": -1}}, ValueError, r"n_frequency_pattern\['lin1'\]"),
        (FourierFTConfig, {"random_loc_seed": None}, ValueError, "`random_loc_seed` should be an integer"),
        (FourierFTConfig, {"bias": "lora_only"}, NotImplementedError, "Requested bias: lora_only"),
        (BOFTConfig, {"boft_block_num": 2}, ValueError, r"You can only specify either boft_block_size \(4\) or"),
        (BOFTConfig, {"boft_block_size": 0}, ValueError, "Either `boft_block_size` or `boft_block_num` must be non-z"),
        (BOFTConfig, {}, ValueError, r"in_features \(6\) must be divisible by boft_block_size \(4\)! At lin0"),
        (
            BOFTConfig,
            {"boft_block_size": 3, "boft_n_butterfly_factor": 2},
            ValueError,
            r"Invalid combination of in_features \(6\), boft_n_butterfly_factor \(2\) and boft_block_size \(3\)",
        ),
        (BOFTConfig, {"boft_n_butterfly_factor": 0}, ValueError, "`boft_n_butterfly_factor` should be a positive"),
        (RandLoraConfig, {"r": 0}, ValueError, "`r` should be a positive integer"),
        (RandLoraConfig, {"projection_prng_key": None}, ValueError, "`projection_prng_key` should be an integer"),
        (RandLoraConfig, {"target_modules": ["nowhere"]}, NoMatchingPeftModuleError, "nowhere"),
    ],
)
def test_what_is_refused(config, settings, error, text):
    base = nets.Dense()
    before = state_of(base)
    with pytest.raises(error, match=text):
        get_peft_model(base, config(**{"target_modules": BOTH} | settings))
    assert state_of(base) == before


def test_boft_refuses_grouped_convolutions():
    with pytest.raises(NotImplementedError, match="groups > 1: conv is"):
        get_peft_model(nets.Conv(2, channels=(4, 4), group=2), BOFTConfig(target_modules=["conv"]))
