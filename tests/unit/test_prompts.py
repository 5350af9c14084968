"""Prompt methods where the model, the tokenizer or the call is not the usual one."""

import builtins
import copy
from collections import UserDict
from types import SimpleNamespace
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from msft_peft import (
    CartridgeConfig,
    ConfigError,
    CPTConfig,
    LoadError,
    LoraConfig,
    MultitaskPromptTuningConfig,
    PeftConfig,
    PeftModel,
    PeftModelForCausalLM,
    PrefixTuningConfig,
    PromptEmbedding,
    PromptEncoder,
    PromptEncoderConfig,
    PromptTuningConfig,
    cast_mixed_precision_params,
    compose_cartridge_adapters,
    get_peft_model,
    get_peft_model_state_dict,
    initialize_kv_prefix_from_past_key_values,
    initialize_kv_prefix_from_text,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from msft_peft.functional import set_adapter
from msft_peft.hosts import tokenizers
from tests import nets
from tests.cases import state_of
from tests.models import tiny
from tests.tolerances import array, assert_same, differ

CAUSAL = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}


class Plain(nn.Cell):
    """An embedding and a layer, with no config, and a first argument of another name."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 6)
        self.out = nn.Dense(6, 4)

    def construct(self, tokens: Tensor | None = None, inputs_embeds: Tensor | None = None) -> Tensor:
        return self.out(self.table(tokens) if inputs_embeds is None else inputs_embeds)


class TwoTables(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Embedding(10, 6)


IDS = nets.ids(2, 5)


# --- models --------------------------------------------------------------------------------------------------------


def test_a_cell_without_config_or_usual_names(mode: str):
    model = get_peft_model(Plain(), PromptTuningConfig(**CAUSAL))
    assert model.peft_config["default"].token_dim == 6
    assert model(IDS).shape == (2, 8, 4)
    assert_same(model(tokens=IDS), model(IDS))
    embedded = model.get_base_model().table(IDS)
    assert_same(model(inputs_embeds=embedded), model(IDS))
    with model.disable_adapter():
        assert model(IDS).shape == (2, 5, 4)


def test_what_the_model_does_not_tell_is_asked_for():
    for config, text in (
        (PrefixTuningConfig(**CAUSAL), "past_key_values=None, a tuple with a pair"),
        (PromptTuningConfig(**CAUSAL, token_dim=7), "token_dim=7, but the model's tokens are vectors of length 6"),
    ):
        base = Plain()
        before = state_of(base)
        with pytest.raises(ConfigError, match=text):
            get_peft_model(base, config)
        assert state_of(base) == before
    with pytest.raises(ConfigError, match="get_input_embeddings"):
        get_peft_model(TwoTables(), PromptTuningConfig(**CAUSAL))
    with pytest.raises(ConfigError, match="inputs_embeds=None, the embeddings"):
        get_peft_model(nets.Dense(), PromptTuningConfig(**CAUSAL))
    bare = nets.Reader()
    bare.config = {"hidden_size": 8}
    with pytest.raises(ConfigError, match="Please specify `num_layers` in `peft_config`"):
        get_peft_model(bare, PrefixTuningConfig(**CAUSAL))
    told = get_peft_model(bare, PrefixTuningConfig(**CAUSAL, num_layers=1, token_dim=8, num_attention_heads=2))
    assert told(nets.ids(2, 5))["logits"].shape == (2, 5, 3)


SHARED = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    "config",
    [
        {"n_embd": 8, "n_layer": 1, "n_head": 2},
        SimpleNamespace(d_model=8, num_layers=1, num_heads=2),
        SimpleNamespace(text_config=SHARED),
        UserDict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2),
    ],
)
def test_sizes_are_found_under_any_of_their_names(config: Any):
    base = nets.Reader()
    base.config = config
    model = get_peft_model(base, PrefixTuningConfig(**CAUSAL))
    found = model.peft_config["default"]
    assert (found.num_layers, found.token_dim, found.num_attention_heads) == (1, 8, 2)
    assert model(nets.ids(2, 5))["logits"].shape == (2, 5, 3)


def test_the_table_may_be_trained_whole():
    config = PromptTuningConfig(**CAUSAL, modules_to_save=["emb"])
    model = get_peft_model(nets.Reader(), config)
    names = sorted(p.name for p in model.trainable_params())
    assert names == [
        "base_model.emb.modules_to_save.default.embedding_table",
        "prompt_encoder.default.embedding.weight",
    ]
    before = array(model(nets.ids(2, 5))["logits"])
    p = model.get_base_model().emb.modules_to_save["default"].embedding_table
    p.copy_(p + 1.0)
    assert differ(model(nets.ids(2, 5))["logits"], before)


def test_a_prefix_follows_the_models_precision():
    model = get_peft_model(nets.Reader(), PrefixTuningConfig(**CAUSAL))
    cast_mixed_precision_params(model, ms.float16)
    assert model(nets.ids(2, 5))["logits"].dtype == ms.float16
    assert model.prompt_encoder["default"].embedding.weight.dtype == ms.float32


def test_a_copy_of_the_model_is_a_model_of_its_own():
    model = get_peft_model(nets.Reader(), PromptTuningConfig(**CAUSAL))
    twin = copy.deepcopy(model)
    y = array(model(nets.ids(2, 5))["logits"])
    p = twin.prompt_encoder["default"].embedding.weight
    p.copy_(p + 1.0)
    with twin.disable_adapter():
        assert_same(model(nets.ids(2, 5))["logits"], y, "exact")
    assert differ(twin(nets.ids(2, 5))["logits"], y)


# --- other methods -------------------------------------------------------------------------------------------------


def test_prompts_and_layers_do_not_mix():
    lora = LoraConfig(target_modules=["qkv"], task_type="CAUSAL_LM")
    prompted = get_peft_model(nets.Reader(), PromptTuningConfig(**CAUSAL))
    for base, config in (
        (get_peft_model(nets.Reader(), lora).get_base_model(), PromptTuningConfig(**CAUSAL)),
        (prompted.get_base_model(), lora),
        (prompted.get_base_model(), PrefixTuningConfig(**CAUSAL)),
    ):
        with pytest.warns(UserWarning, match="a second time"):
            with pytest.raises(ConfigError, match="Cannot combine adapters with different peft types"):
                get_peft_model(base, config, "other")
    prompted.delete_adapter("default")
    model = get_peft_model(prompted.get_base_model(), lora)
    assert model(nets.ids(2, 5))["logits"].shape == (2, 5, 3)
    with pytest.raises(ConfigError, match="use get_peft_model"):
        inject_adapter_in_model(PromptTuningConfig(**CAUSAL), nets.Reader())


def test_one_prompt_at_a_time():
    model = get_peft_model(nets.Reader(), PromptTuningConfig(**CAUSAL), "one")
    model.add_adapter("two", PromptTuningConfig(**CAUSAL))
    with pytest.raises(ConfigError, match="one of them alone can stand before the input"):
        set_adapter(model, ["one", "two"])
    set_adapter(model, "two")
    assert model.active_adapters == ["two"]


def test_prefixes_and_gradient_checkpointing():
    ms.set_seed(1)
    prompted = get_peft_model(tiny.decoder(), PromptTuningConfig(**CAUSAL))
    prompted.gradient_checkpointing_enable()
    assert prompted.is_gradient_checkpointing
    prompted.delete_adapter("default")
    refused = "PREFIX_TUNING does not work with gradient checkpointing"
    with pytest.raises(ConfigError, match=refused):
        get_peft_model(prompted.get_base_model(), PrefixTuningConfig(**CAUSAL))
    prompted.gradient_checkpointing_disable()
    model = get_peft_model(prompted.get_base_model(), PrefixTuningConfig(**CAUSAL))
    with pytest.raises(ConfigError, match=refused):
        model.gradient_checkpointing_enable()
    assert not model.is_gradient_checkpointing


# --- calls ---------------------------------------------------------------------------------------------------------


def test_generation_in_graph_mode(mode: str):
    """A prompt of 3 tokens, a prefix, none: as in PyNative, and from the same graphs when called again."""
    base = tiny.decoder()
    alone = copy.deepcopy(base)
    prompt = PeftModelForCausalLM(base, PromptTuningConfig(**CAUSAL))
    ids = tiny.tokens(2, 6)
    mask = np.array([[0, 0, 1, 1, 1, 1], [1] * 6], np.int32)
    found = prompt.generate(ids, attention_mask=mask, max_new_tokens=3).asnumpy()
    with prompt.disable_adapter():
        plain = prompt.generate(ids, attention_mask=mask, max_new_tokens=3).asnumpy()
    ms.set_context(mode=ms.PYNATIVE_MODE)
    again = prompt.generate(Tensor(ids), attention_mask=Tensor(mask), max_new_tokens=3).asnumpy()
    assert again.tolist() == found.tolist()
    assert alone.generate(ids, mask, max_new_tokens=3).asnumpy().tolist() == plain.tolist()
    assert found.shape == (2, 9)


def test_positions_and_types_are_ignored_with_a_warning():
    model = get_peft_model(tiny.decoder(), PromptTuningConfig(**CAUSAL)).set_train(False)
    ids = Tensor(tiny.tokens(2, 5))
    y = array(model(input_ids=ids)["logits"])
    with pytest.warns(UserWarning, match="Position ids are not supported"):
        assert_same(model(input_ids=ids, position_ids=ids)["logits"], y)
    with pytest.warns(UserWarning, match="Token type ids are not supported"):
        assert_same(model(input_ids=ids, token_type_ids=ids)["logits"], y)


def test_calls_that_cannot_be():
    prefixed = get_peft_model(nets.Reader(), PrefixTuningConfig(**CAUSAL))
    with pytest.raises(ValueError, match="makes its own past_key_values"):
        prefixed(nets.ids(2, 5), past_key_values=prefixed.get_prompt(2))
    with pytest.raises(ValueError, match="neither input_ids nor inputs_embeds"):
        prefixed(attention_mask=nets.ids(2, 5))
    shared = get_peft_model(nets.Reader(), MultitaskPromptTuningConfig(**CAUSAL, num_tasks=2))
    with pytest.raises(ValueError, match="task_ids cannot be None"):
        shared(nets.ids(2, 5))
    with shared.disable_adapter():
        shared(nets.ids(2, 5), task_ids=Tensor([0, 1]))


def test_what_stands_before_the_input_can_be_had():
    model = get_peft_model(nets.Reader(), PromptEncoderConfig(**CAUSAL, encoder_hidden_size=4))
    rows = array(model.get_prompt(2))
    assert rows.shape == (2, 3, 8)
    assert_same(rows[0], model.get_prompt_embedding_to_save("default"))
    assert_same(model.prompt_encoder["default"](Tensor([2, 0])), rows[0][[2, 0]])
    assert model.word_embeddings is model.get_base_model().emb
    with pytest.raises(ValueError, match="is no adapter with virtual tokens"):
        model.get_prompt_embedding_to_save("nope")
    lora = get_peft_model(nets.Dense(), LoraConfig(target_modules=["lin0"]))
    with pytest.raises(ValueError, match="no adapter that puts virtual tokens"):
        lora.get_prompt(2)


def test_states_are_written_in_place():
    model = get_peft_model(nets.Reader(), PromptTuningConfig(**CAUSAL))
    state = {key: Tensor(array(value) + 1) for key, value in get_peft_model_state_dict(model).items()}
    set_peft_model_state_dict(model, state)
    assert_same(model.prompt_encoder["default"].embedding.weight, state["prompt_embeddings"], "exact")
    with pytest.raises(LoadError, match="size mismatch for prompt_embeddings"):
        set_peft_model_state_dict(model, {"prompt_embeddings": Tensor(np.zeros((4, 8), np.float32))})
    made = get_peft_model(nets.Reader(), PromptEncoderConfig(**CAUSAL))
    with pytest.warns(UserWarning, match="prompt_encoder.mlp_head.0.weight"):
        report = set_peft_model_state_dict(made, state)
    assert report.unexpected_keys == ("prompt_embeddings",)


def test_files_that_do_not_fit(tmp_path):
    get_peft_model(nets.Reader(), PromptTuningConfig(**CAUSAL)).save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    config.num_virtual_tokens = 5
    config.save_pretrained(tmp_path)
    base = nets.Reader()
    before = state_of(base)
    for options in ({}, {"strict": False, "ignore_mismatched_sizes": True}):
        with pytest.raises(LoadError, match="prompt_embeddings"):
            PeftModel.from_pretrained(base, tmp_path, **options)
    assert state_of(base) == before


# --- beginnings ----------------------------------------------------------------------------------------------------


def began(config: PromptTuningConfig) -> np.ndarray:
    model = get_peft_model(nets.Reader(), config)
    rows, table = (
        array(model.prompt_encoder["default"].embedding.weight),
        array(model.get_base_model().emb.embedding_table),
    )
    return np.array([np.flatnonzero((table == row).all(1))[0] for row in rows])


class Encoding:
    ids = (4, 7)


class ByEncode:
    """As `tokenizers.Tokenizer`: not to be called."""

    def encode(self, text: str) -> Encoding:
        return Encoding()


@pytest.mark.parametrize("tokenizer", [lambda text: [4, 7], lambda text: {"input_ids": [4, 7]}, ByEncode()])
def test_a_text_through_any_tokenizer(tokenizer: Any, tmp_path):
    text = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "any", "tokenizer_name_or_path": tokenizer}
    assert began(PromptTuningConfig(**CAUSAL, **text)).tolist() == [4, 7, 4]
    model = get_peft_model(nets.Reader(), PromptTuningConfig(**CAUSAL, **text))
    model.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).tokenizer_name_or_path == type(tokenizer).__name__
    PeftModel.from_pretrained(nets.Reader(), tmp_path, is_trainable=True)


def test_tokens_from_the_vocabulary():
    assert set(began(PromptTuningConfig(**CAUSAL, prompt_tuning_init="SAMPLE_VOCAB"))) <= set(range(12))


@pytest.mark.parametrize(
    ("tokenizer", "said"),
    [
        (lambda text: [], "gives the tokens"),
        (lambda text: [12], "embeddings for 0 to 11"),
        (lambda text: 5, "wanted a list of"),
        (7, "must be a name, a folder, a tokenizer or a function"),
    ],
)
def test_what_is_no_tokenizer(tokenizer: Any, said: str):
    text = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "any", "tokenizer_name_or_path": tokenizer}
    with pytest.raises(ConfigError, match=said):
        get_peft_model(nets.Reader(), PromptTuningConfig(**CAUSAL, **text))


def test_a_tokenizer_by_name_needs_a_library(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tokenizers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs transformers or tokenizers"):
        tokenizers.encode("some/name", "text")


BAD = [
    (PromptTuningConfig, {"prompt_tuning_init": "FOO"}, "prompt_tuning_init must be one of"),
    (PromptTuningConfig, {"num_virtual_tokens": 0}, "num_virtual_tokens"),
    (PromptTuningConfig, {"num_virtual_tokens": True}, "num_virtual_tokens"),
    (PromptTuningConfig, {"num_transformer_submodules": 3}, "num_transformer_submodules"),
    (PromptTuningConfig, {"modules_to_save": "head"}, r"`modules_to_save` must be list\[str\]"),
    (PromptEncoderConfig, {"encoder_reparameterization_type": "GRU"}, "must be one of"),
    (PromptEncoderConfig, {"encoder_hidden_size": 0}, "encoder_hidden_size"),
    (PrefixTuningConfig, {"init_weights": "ones"}, "init_weights must be None or 'zero'"),
    (CartridgeConfig, {"num_frozen_tokens": -1}, "must be >= 0"),
    (CartridgeConfig, {"num_frozen_tokens": 3, "num_virtual_tokens": 2}, "must be <= `num_virtual_tokens`"),
    (MultitaskPromptTuningConfig, {"num_ranks": 0}, "num_ranks"),
    (MultitaskPromptTuningConfig, {"prompt_tuning_init": "SAMPLE_VOCAB"}, "prompt_tuning_init must be one of"),
    (CPTConfig, {"task_type": "SEQ_CLS"}, "only supports task_type = CAUSAL_LM"),
    (CPTConfig, {"task_type": "CAUSAL_LM", "opt_weighted_loss_type": "x"}, "opt_weighted_loss_type"),
    (CPTConfig, {"task_type": "CAUSAL_LM", "cpt_token_ids": []}, "same length"),
]


@pytest.mark.parametrize(("kind", "fields", "said"), BAD)
def test_bad_configs(kind: type, fields: dict, said: str):
    with pytest.raises(ConfigError, match=said):
        kind(**fields)


def cache(tokens: int = 4, rows: int = 1, layers: int = 1, heads: int = 2) -> tuple:
    rng = np.random.default_rng(0)
    return tuple(
        tuple(Tensor(rng.standard_normal((rows, heads, tokens, 4)).astype(np.float32)) for _ in range(2))
        for _ in range(layers)
    )


@pytest.mark.parametrize("frozen", [0, 1, 3])
def test_a_cartridge_that_begins_as_a_cache(frozen: int, tmp_path):
    """Of all tokens frozen nothing is left to train; either file holds all."""
    model = get_peft_model(nets.Reader(), CartridgeConfig(**CAUSAL, num_frozen_tokens=frozen))
    given = cache()
    rows = initialize_kv_prefix_from_past_key_values(model, past_key_values=given)
    key, value = (part.asnumpy()[0, :, :3].swapaxes(0, 1).reshape(3, 8) for part in given[0])
    np.testing.assert_array_equal(rows.asnumpy(), np.concatenate((key, value), 1))
    np.testing.assert_array_equal(model.prompt_encoder["default"].weight.asnumpy(), rows.asnumpy())
    assert sum(p.size for p in model.trainable_params()) == (3 - frozen) * 16
    model.save_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    (tmp_path / "b" / "adapter_model.safetensors").unlink()
    for name in ("a", "b"):
        again = PeftModel.from_pretrained(nets.Reader(), tmp_path / name)
        np.testing.assert_array_equal(again.prompt_encoder["default"].rows(), rows.asnumpy())
    compose_cartridge_adapters([tmp_path / "a", tmp_path / "b"], output_path=tmp_path / "both")
    both = PeftModel.from_pretrained(nets.Reader(), tmp_path / "both").prompt_encoder["default"]
    np.testing.assert_array_equal(both.rows(), np.tile(rows.asnumpy(), (2, 1)))
    assert len(both.parts()) == 1 + (frozen > 0)


def test_caches_that_no_prefix_can_begin_as(tmp_path):
    model = get_peft_model(nets.Reader(), CartridgeConfig(**CAUSAL))
    before = model.prompt_encoder["default"].rows()
    (key, value), *_ = cache()
    for past, said in (
        ((), "Empty"),
        (cache(rows=2), "batch=2"),
        (cache(tokens=2), "Need at least 3 cached tokens, got 2"),
        (((key[0], value[0]),), "rank 4, got key.ndim=3"),
        ((*cache(), *cache(heads=1)), "Inconsistent heads: layer 1"),
        (cache(layers=2), r"Expected \(3, 16\), got \(3, 32\)"),
    ):
        with pytest.raises(ValueError, match=said):
            initialize_kv_prefix_from_past_key_values(model, past_key_values=past)
    with pytest.raises(TypeError, match="Expected a pair"):
        initialize_kv_prefix_from_past_key_values(model, past_key_values=4)
    np.testing.assert_array_equal(model.prompt_encoder["default"].rows(), before)
    projected = get_peft_model(nets.Reader(), PrefixTuningConfig(**CAUSAL, prefix_projection=True))
    with pytest.raises(ConfigError, match="a network makes it"):
        initialize_kv_prefix_from_past_key_values(projected, past_key_values=cache())
    with pytest.raises(ConfigError, match="a network makes cannot be written"):
        projected.prompt_encoder["default"].load_prompt_embeddings(before)
    with pytest.raises(ConfigError, match="got PROMPT_TUNING"):
        initialize_kv_prefix_from_text(get_peft_model(nets.Reader(), PromptTuningConfig(**CAUSAL)), list, text="ab")
    projected.save_pretrained(tmp_path / "prefix")
    get_peft_model(nets.Reader(), CartridgeConfig(**CAUSAL, modules_to_save=["emb"])).save_pretrained(tmp_path / "emb")
    model.save_pretrained(tmp_path / "a")
    get_peft_model(nets.Reader(True), CartridgeConfig(**CAUSAL | {"task_type": "SEQ_CLS"})).save_pretrained(
        tmp_path / "other"
    )
    for name, said in (
        ("prefix", "is not a CARTRIDGE adapter"),
        ("emb", "trained whole"),
        ("other", "'task_type'"),
    ):
        with pytest.raises(ConfigError, match=said):
            compose_cartridge_adapters([tmp_path / "a", tmp_path / name], output_path=tmp_path / "never")
    with pytest.raises(ConfigError, match="at least 2"):
        compose_cartridge_adapters([tmp_path / "a"], output_path=tmp_path / "never")
    with pytest.raises(NotImplementedError, match="safetensors only"):
        compose_cartridge_adapters([], output_path=tmp_path / "never", safe_serialization=False)
    assert not (tmp_path / "never").exists()


def test_multitask_prompts_that_cannot_begin(tmp_path):
    source = {**CAUSAL, "prompt_tuning_init": "AVERAGE_SOURCE_TASKS"}
    base = nets.Reader()
    shared = get_peft_model(nets.Reader(), MultitaskPromptTuningConfig(**CAUSAL, num_tasks=2))
    shared.save_pretrained(tmp_path / "mpt")
    (tmp_path / "bad.safetensors").write_bytes(b"x")
    get_peft_model(nets.Reader(), PromptTuningConfig(**CAUSAL)).save_pretrained(tmp_path / "pt")
    for fields, said in (
        ({}, "prompt_tuning_init_state_dict_path needs to be specified"),
        ({"prompt_tuning_init_state_dict_path": str(tmp_path / "nope")}, "there is no file"),
        ({"prompt_tuning_init_state_dict_path": str(tmp_path / "bad.safetensors")}, "no valid safetensors file"),
        ({"prompt_tuning_init_state_dict_path": str(tmp_path / "pt")}, "has no"),
        ({"prompt_tuning_init_state_dict_path": str(tmp_path / "mpt"), "num_tasks": 2}, "num_tasks must be 1"),
        ({"prompt_tuning_init_state_dict_path": str(tmp_path / "mpt"), "num_ranks": 2}, "has shape"),
        (
            {"prompt_tuning_init_state_dict_path": str(tmp_path / "mpt"), "prompt_tuning_init_task": 2}
            | {"prompt_tuning_init": "EXACT_SOURCE_TASK"},
            "the source has the tasks 0 to 1",
        ),
    ):
        with pytest.raises(ConfigError, match=said):
            get_peft_model(base, MultitaskPromptTuningConfig(**source | fields))


def test_networks_for_themselves():
    """As HF's modules: made from a config, called with the rows that are wanted."""
    config = PromptTuningConfig(num_virtual_tokens=4, token_dim=6)
    cell = PromptEmbedding(config, None)
    assert_same(cell(ops.arange(4)), cell.embedding.weight)
    encoder = PromptEncoder(PromptEncoderConfig(num_virtual_tokens=4, token_dim=6, encoder_hidden_size=5))
    assert encoder(Tensor([1])).shape == (1, 6)
    with pytest.warns(UserWarning, match="`encoder_num_layers` is ignored"):
        PromptEncoder(PromptEncoderConfig(num_virtual_tokens=4, token_dim=6, encoder_num_layers=3))


def test_zero_prefixes():
    for projected in (False, True):
        config = PrefixTuningConfig(**CAUSAL, init_weights="zero", prefix_projection=projected)
        model = get_peft_model(nets.Reader(), config)
        assert not array(model.get_prompt_embedding_to_save("default")).any()


def test_nothing_imports_a_tokenizer_library(monkeypatch: pytest.MonkeyPatch):
    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        assert name.split(".")[0] not in ("transformers", "tokenizers"), name
        return real(name, *args, **kwargs)

    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", refuse)
    get_peft_model(nets.Reader(), PromptTuningConfig(**CAUSAL, prompt_tuning_init="SAMPLE_VOCAB"))
