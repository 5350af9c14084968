"""MindFormers' pet_config as our configs, and back."""

import warnings
from pathlib import Path

import pytest

from msft_peft import (
    BottleneckAdapterConfig,
    ConfigError,
    LoraConfig,
    LowRankAdapterConfig,
    from_pet_config,
    get_peft_model,
    to_pet_config,
)
from msft_peft.errors import PeftWarning
from tests import nets
from tests.cases import layers_of

LORA = {"pet_type": "lora", "lora_rank": 4, "lora_alpha": 12, "lora_dropout": 0.1, "target_modules": ".*q|.*mlp"}
RUN = """
model:
  model_config:
    type: LlamaConfig
    num_layers: 2
    num_heads: 4
    hidden_size: 32
    pet_config:
      pet_type: lora
      lora_rank: 4
      lora_alpha: 12
      lora_dropout: 0.1
      target_modules: '.*q|.*mlp'
  arch:
    type: LlamaForCausalLM
parallel:
  strategy_ckpt_config:
    save_file: "./ckpt_strategy.ckpt"
    only_trainable_params: {only}
"""


@pytest.fixture(autouse=True)
def loud():
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftWarning)
        yield


def paths(config: object) -> list[str]:
    return [layer.site.path for layer in layers_of(get_peft_model(nets.Blocks(), config))]


BLOCKS = [f"layers.{n}.{end}" for n in range(2) for end in ("attn.q", "mlp")]


def test_a_block_a_run_configuration_a_text_and_a_file(tmp_path: Path):
    config = from_pet_config(LORA)
    assert isinstance(config, LoraConfig)
    assert (config.r, config.lora_alpha, config.lora_dropout, config.init_lora_weights) == (4, 12, 0.1, True)
    assert paths(config) == BLOCKS
    text = RUN.format(only=False)
    (tmp_path / "run.yaml").write_text(text)
    for source in (text, tmp_path / "run.yaml", str(tmp_path / "run.yaml"), {"model": {"pet_config": LORA}}):
        assert from_pet_config(source) == config
    assert paths(from_pet_config(LORA, nets.Blocks())) == BLOCKS


def test_defaults_are_mindformers():
    config = from_pet_config({"pet_type": "lora", "target_modules": ".*q", "lora_a_init": "normal", "lora_rank": None})
    assert (config.r, config.lora_alpha, config.lora_dropout) == (8, 16, 0.01)
    config = from_pet_config({"pet_type": "slora", "target_modules": ".*q", "lora_dtype": "float16", "lora_num": 1})
    assert (config.r, config.lora_alpha, config.lora_dropout, config.inference_mode) == (8, 8, 0.0, True)


@pytest.mark.parametrize(
    ("regex", "ends"),
    [
        (".*q", ["attn.q"]),
        ("q|v", ["attn.q", "attn.v"]),
        ("[qv]$", ["attn.q", "attn.v"]),
        ("ml", ["mlp"]),  # the beginning of a name is enough
        (r"\w", ["attn.q", "attn.v", "mlp"]),
    ],
)
def test_regexes_are_for_the_names_of_layers(regex: str, ends: list[str]):
    """With the model, only layers are meant that can be adapted; the head is one, and is no output head here."""
    config = from_pet_config({"pet_type": "lora", "target_modules": regex}, nets.Blocks())
    found = [path for path in paths(config) if path != "head"]
    assert found == [f"layers.{n}.{end}" for n in range(2) for end in ends]
    if regex != r"\w":
        assert paths(from_pet_config({"pet_type": "lora", "target_modules": regex})) == found


@pytest.mark.parametrize("model", [None, nets.Blocks()])
def test_excluded_subtrees(model: object):
    settings = LORA | {"exclude_layers": ["0$", ".*nothing"]}
    assert paths(from_pet_config(settings, model)) == BLOCKS[2:]
    assert paths(from_pet_config(LORA | {"exclude_layers": ["att"]}, model)) == ["layers.0.mlp", "layers.1.mlp"]


def test_what_is_trained_beside():
    assert from_pet_config(LORA | {"freeze_exclude": ["*bias"]}).bias == "all"
    assert from_pet_config(LORA | {"freeze_exclude": ["*head*"]}, nets.Blocks()).modules_to_save == ["head"]
    with pytest.raises(ConfigError, match="pass the model"):
        from_pet_config(LORA | {"freeze_exclude": ["*head*"]})
    with pytest.raises(ConfigError, match="matches no parameter of Blocks"):
        from_pet_config(LORA | {"freeze_exclude": ["*haed*"]}, nets.Blocks())
    with pytest.raises(ConfigError, match="freeze_include"):
        from_pet_config(LORA | {"freeze_include": ["*lora_a*"]})


def test_adapters():
    config = from_pet_config({"pet_type": "adapter", "bottleneck_size": 8, "target_modules": "mlp"})
    assert (type(config), config.bottleneck_size, config.non_linearity) == (BottleneckAdapterConfig, 8, "gelu")
    config = from_pet_config({"pet_type": "low_rank_adapter", "reduction_factor": 2, "target_modules": "mlp"})
    assert (type(config), config.reduction_factor, config.low_rank_size) == (LowRankAdapterConfig, 2, 1)
    assert paths(from_pet_config({"pet_type": "bitfit", "target_modules": "mlp"})) == ["layers.0.mlp", "layers.1.mlp"]


@pytest.mark.parametrize(
    ("settings", "tokens", "hidden", "projection"),
    [
        ({"pet_type": "ptuning2", "pre_seq_len": 16, "prefix_projection": True, "projection_dim": 64}, 16, 64, True),
        ({"pet_type": "ptuning2", "dropout_prob": 0.0}, 128, 128, False),
        ({"pet_type": "prefixtuning", "prefix_token_num": 32, "mid_dim": 48, "dropout_rate": 0.0}, 32, 48, True),
    ],
)
def test_prefixes(settings: dict, tokens: int, hidden: int, projection: bool):
    config = from_pet_config({"num_layers": 3, "num_heads": 4, "hidden_size": 32, "pet_config": settings})
    assert (config.peft_type, config.num_virtual_tokens) == ("PREFIX_TUNING", tokens)
    assert (config.encoder_hidden_size, config.prefix_projection) == (hidden, projection)
    assert (config.num_layers, config.num_attention_heads, config.token_dim) == (3, 4, 32)
    assert from_pet_config(to_pet_config(config)).num_virtual_tokens == tokens


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ({"pet_type": "adalora"}, "pet_type='adalora'; it must be one of"),
        ({}, "Found 0 blocks called pet_config"),
        ({"a": {"pet_config": LORA}, "b": [{"pet_config": LORA}]}, "Found 2 blocks called pet_config"),
        ({"pet_config": 3}, "pet_config must be a mapping, got 3"),
        (LORA | {"rank": 3, "colour": 1}, r"unknown keys: colour, rank \(did you mean lora_rank\?\)"),
        ({"pet_type": "ptuning2", "target_modules": "q"}, "unknown keys: target_modules"),
        (LORA | {"target_modules": ["q"]}, "must hold regular expressions"),
        (LORA | {"target_modules": "(q"}, "no valid regular expression"),
        (LORA | {"lora_rank": 0}, "pet_config is no valid LoraConfig"),
        ("nowhere.yaml", "nowhere.yaml is no file"),
        ("a: [", "no valid YAML"),
        ("- 1\n- 2", "holds no mapping"),
    ],
)
def test_refusals(source: object, text: str):
    with pytest.raises(ConfigError, match=text):
        from_pet_config(source)


def test_a_model_without_such_layers():
    with pytest.raises(ConfigError, match="no dense layer of Blocks"):
        from_pet_config(LORA | {"target_modules": "norm"}, nets.Blocks())


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (LORA | {"lora_a_init": "ones"}, "lora_a_init='ones', which is left out: MindFormers does not obey it either"),
        (LORA | {"compute_dtype": "float16"}, "autocast_adapter_dtype"),
        ({"pet_type": "slora", "target_modules": "q", "lora_num": 3}, "lora_num=3"),
        (RUN.format(only=True), "only_trainable_params is not False"),
    ],
)
def test_what_has_no_counterpart_is_said(settings: object, text: str):
    with pytest.warns(PeftWarning, match=text):
        from_pet_config(settings)


@pytest.mark.parametrize(
    "settings",
    [
        LORA,
        LORA | {"exclude_layers": [".*out|0$"]},
        LORA | {"freeze_exclude": ["*bias"]},
        {"pet_type": "adapter", "bottleneck_size": 8, "non_linearity": "relu", "target_modules": "mlp"},
        {"pet_type": "bitfit"},
    ],
)
def test_there_and_back(settings: dict):
    config = from_pet_config(settings)
    assert to_pet_config(config) == settings
    assert from_pet_config(to_pet_config(config)) == config


def test_our_own_configs_as_pet_config():
    config = LoraConfig(r=4, lora_alpha=12, lora_dropout=0.1, target_modules=["q", "mlp"], task_type="CAUSAL_LM")
    block = to_pet_config(config)
    assert block == LORA | {"target_modules": "mlp$|q$"}
    assert paths(from_pet_config(block)) == BLOCKS
    for bad, text in (
        (LoraConfig(target_modules=["attn.q"]), "names of single layers"),
        (LoraConfig(target_modules=r".*\.q"), "names of single layers"),
        (LoraConfig(target_modules=["q"], use_rslora=True, use_dora=True), "cannot say use_rslora, use_dora"),
    ):
        with pytest.raises(ConfigError, match=text):
            to_pet_config(bad)
