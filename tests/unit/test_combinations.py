"""Variants, extras and switches together: what is left over from one must not meet the next."""

import pytest

from msft_peft import ConfigError, LoraConfig, get_peft_model
from tests import nets
from tests.cases import shake, state_of, weights_of
from tests.tolerances import array, assert_same
from tests.unit.test_variants import IDS, Q, llama

ALORA = LoraConfig(**Q, alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM")
LIN0 = LoraConfig(r=2, target_modules=["lin0"])


@pytest.mark.parametrize("ranges", [None, [[0, 3], [0, 2]]])
def test_repeated_blocks_outlive_their_adapters_until_the_unload(ranges: list | None):
    net = llama()
    model = get_peft_model(net, LoraConfig(**Q, layer_replication=[[0, 2], [1, 2]]))
    model.delete_adapter("default")
    before = state_of(net)
    with pytest.raises(ConfigError, match="unload"):
        model.add_adapter("other", LoraConfig(r=2, target_modules=["lm_head"], layer_replication=ranges))
    assert state_of(net) == before
    assert len(net.model.layers) == net.config.num_hidden_layers == 3
    assert len(model.unload().model.layers) == net.config.num_hidden_layers == 2


def test_a_mixed_batch_that_fails_leaves_the_next_call_alone():
    model = get_peft_model(llama(), ALORA).set_train(False)
    shake(weights_of(model, "default"))
    expected = array(model(IDS)["logits"])
    with pytest.raises(ValueError, match="shape"):  # no token ids to look for invocations in
        model(inputs_embeds=nets.floats(3, 4, 8), adapter_names=["default", "__base__", "__base__"])
    assert_same(model(IDS)["logits"], expected, "exact")
