"""On MindFormers' own models: its layers, its names, its sharding, and its own LoRA beside ours."""

import json
from collections.abc import Iterator
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
import safetensors.numpy
from mindformers.models.llama import LlamaConfig, LlamaForCausalLM
from mindformers.modules.layers import Linear
from mindformers.parallel_core.training_graph.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from mindformers.parallel_core.transformer_config import TransformerConfig
from mindformers.pet import get_pet_model
from mindspore import Tensor, nn, ops

from msft_peft import (
    AdaLoraConfig,
    AutoPeftModelForCausalLM,
    BeftConfig,
    BitFitConfig,
    BOFTConfig,
    GloraConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    RoadConfig,
    ShiraConfig,
    TrainableTokensConfig,
    from_pet_config,
    get_peft_model,
    get_peft_model_state_dict,
)
from msft_peft.errors import ConfigError, LoadError, NoBaseModelError, NoMatchingPeftModuleError
from msft_peft.hosts import describe
from tests.hosts.llama import ADAPTERS, GOLDEN, LINEAR, SIZES, batch, config_of, drawn, golden
from tests.hosts.methods import METHODS_OF_LAYERS, config_for
from tests.tolerances import array, assert_same, differ

OURS = {
    "model.tok_embeddings.embedding_weight": "model.embed_tokens.weight",
    "attention.w": "self_attn.",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "norm_out": "norm",
}


def hf_name(name: str) -> str:
    for ours, theirs in OURS.items():
        name = name.replace(ours, theirs)
    for x in "qkvo":
        name = name.replace(f"self_attn.{x}.", f"self_attn.{x}_proj.")
    return name


def llama(**fields) -> LlamaForCausalLM:
    dtypes = ("compute_dtype", "param_init_type", "layernorm_compute_type", "softmax_compute_type", "rotary_dtype")
    config = LlamaConfig(
        batch_size=2,
        seq_length=12,
        num_layers=SIZES["num_hidden_layers"],
        hidden_size=SIZES["hidden_size"],
        num_heads=SIZES["num_attention_heads"],
        n_kv_heads=SIZES["num_key_value_heads"],
        vocab_size=SIZES["vocab_size"],
        max_position_embedding=SIZES["max_position_embeddings"],
        rms_norm_eps=SIZES["rms_norm_eps"],
        pad_token_id=0,
        use_flash_attention=False,
        use_rope_slice=True,
        fused_rms_norm=False,
        embedding_init_type="float32",
        **{"intermediate_size": SIZES["intermediate_size"]} | dict.fromkeys(dtypes, "float32") | fields,
    )
    model = LlamaForCausalLM(config)
    for name, p in model.parameters_and_names():
        p.set_data(Tensor(drawn(hf_name(name), tuple(p.shape))))
    return model.set_train(False)


def logits(model: nn.Cell) -> np.ndarray:
    return array(model(Tensor(batch()))[0]).reshape(2, 12, -1)


def step(model: nn.Cell, weights: list) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss that MindFormers computes of 13 tokens, and its gradients."""
    model.set_train()
    tokens = Tensor(np.concatenate([batch(), batch()[:, :1]], 1))

    def forward(tokens: Tensor) -> Tensor:
        return model(tokens)

    return ms.value_and_grad(forward, None, weights)(tokens)


# --- names and numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, fields in ADAPTERS.items() if "target_modules" in fields])
def test_hf_adapters_give_hfs_numbers(name: str, tmp_path: Path):
    """An adapter of HF peft loads by HF's names, and is saved under them again, to the byte."""
    wanted = golden(name)
    base = llama()
    assert_same(logits(base), wanted["base"], "merge")
    model = PeftModel.from_pretrained(base, GOLDEN / name)
    assert model.load_report.does_something
    assert_same(logits(model), wanted["logits"], "merge")
    with model.disable_adapter():
        assert_same(logits(model), wanted["base"], "merge")
    model.save_pretrained(tmp_path)
    model.merge_adapter()
    assert_same(logits(model), wanted["logits"], "merge")
    model.unmerge_adapter()
    assert_same(logits(model), wanted["logits"], "merge")
    mine, theirs = (safetensors.numpy.load_file(f / "adapter_model.safetensors") for f in (tmp_path, GOLDEN / name))
    assert {key: value.tobytes() for key, value in mine.items()} == {k: v.tobytes() for k, v in theirs.items()}
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    for field in ("target_modules", "feedforward_modules", "trainable_token_indices", "target_parameters"):
        assert saved.get(field) == config_of(name).get(field)


@pytest.mark.graph
@pytest.mark.parametrize("name", ["lora", "dora", "ln", "extras"])
def test_hfs_numbers_in_graph_mode(name: str):
    ms.set_context(mode=ms.GRAPH_MODE)
    wanted = golden(name)
    model = PeftModel.from_pretrained(llama(), GOLDEN / name)
    assert_same(logits(model), wanted["logits"], "merge")
    with model.disable_adapter():
        assert_same(logits(model), wanted["base"], "merge")
    model.merge_adapter()
    assert_same(logits(model), wanted["logits"], "merge")


@pytest.mark.parametrize("name", METHODS_OF_LAYERS)
def test_every_method_of_layers(name: str):
    """Two layers of each; a fresh adapter gives numbers, and what it trains gets gradients."""
    model = get_peft_model(llama(), config_for(name))
    loss, gradients = step(model, model.trainable_params())
    assert np.isfinite(array(loss)).all()
    assert all(np.isfinite(array(gradient)).all() for gradient in gradients)
    assert any(np.abs(array(gradient)).max() > 0 for gradient in gradients)
    model.set_train(False)
    with model.disable_adapter():
        assert_same(logits(model), golden("lora")["base"], "merge")


def test_each_row_by_its_own_adapter():
    model = PeftModel.from_pretrained(llama(), GOLDEN / "lora")
    model.add_adapter("other", LoraConfig(r=2, target_modules=["wq"], init_lora_weights=False))
    mixed = array(model(Tensor(batch()), adapter_names=["default", "__base__"])[0]).reshape(2, 12, -1)
    assert_same(mixed[0], golden("lora")["logits"][0], "merge")
    assert_same(mixed[1], golden("lora")["base"][1], "merge")


@pytest.mark.parametrize("stored", ["float32", "float16"])
def test_layers_that_compute_in_half_precision(stored: str):
    """Adapters are kept in float32 and compute as their layer does; weights in half precision come back to the bit."""
    base = llama(compute_dtype="float16", param_init_type=stored)
    before = [array(p) for p in base.get_parameters()]
    model = PeftModel.from_pretrained(base, GOLDEN / "lora", is_trainable=True)
    assert {p.dtype for p in model.trainable_params()} == {ms.float32}
    adapted = logits(model.set_train(False))
    np.testing.assert_allclose(adapted, golden("lora")["logits"], atol=0.05)
    _, gradients = step(model, model.trainable_params())
    assert all(np.abs(array(gradient)).max() > 1e-3 for gradient in gradients)
    model.merge_adapter()
    np.testing.assert_allclose(logits(model.set_train(False)), golden("lora")["logits"], atol=0.05)
    model.unmerge_adapter()
    for p, value in zip(model.unload().get_parameters(), before):
        assert_same(array(p), value, "exact" if stored == "float16" else "merge")


def test_a_merged_model_is_mindformers_own_again(tmp_path: Path):
    merged = PeftModel.from_pretrained(llama(), GOLDEN / "lora").merge_and_unload()
    ms.save_checkpoint(merged, str(tmp_path / "merged.ckpt"))
    plain = llama()
    assert ms.load_param_into_net(plain, ms.load_checkpoint(str(tmp_path / "merged.ckpt"))) == ([], [])
    assert_same(logits(plain), golden("lora")["logits"], "merge")


def test_an_adapter_of_another_size_is_refused(tmp_path: Path):
    get_peft_model(llama(), LoraConfig(r=2, target_modules=["w1"])).save_pretrained(tmp_path)
    base = llama(intermediate_size=64)
    before = list(base.parameters_dict())
    with pytest.raises(LoadError, match=r"gate_proj.lora_B.weight: the file has shape \(48, 2\), the model \(64, 2\)"):
        PeftModel.from_pretrained(base, tmp_path)
    assert list(base.parameters_dict()) == before


def test_norms_by_either_name():
    model = get_peft_model(llama(), LNTuningConfig(target_modules=["attention_norm", "norm_out"]))
    assert model.peft_config["default"].target_modules == ["input_layernorm", "norm"]
    assert "base_model.model.model.norm.ln_tuning_layers.weight" in get_peft_model_state_dict(model)


def test_a_checkpoint_has_mindformers_names_and_comes_back(tmp_path: Path):
    model = PeftModel.from_pretrained(llama(), GOLDEN / "lora")
    model.save_pretrained(tmp_path)
    held = ms.load_checkpoint(str(tmp_path / "adapter_model.ckpt"))
    assert "base_model.model.model.layers.0.attention.wq.lora_A.default.weight" in held
    (tmp_path / "adapter_model.safetensors").unlink()
    assert_same(logits(PeftModel.from_pretrained(llama(), tmp_path)), golden("lora")["logits"], "merge")


@pytest.mark.parametrize(
    ("targets", "saved"),
    [
        (["wq", "q_proj", "w1"], ["gate_proj", "q_proj"]),
        (["attention.wq"], ["self_attn.q_proj"]),
        (["model.layers.1.feed_forward.w2"], ["model.layers.1.mlp.down_proj"]),
        (r".*\.(wq|wv)", ["q_proj", "v_proj"]),
        (r".*1\.attention\.wo", ["model.layers.1.self_attn.o_proj"]),
        (r".*\.self_attn\.o_proj", r".*\.self_attn\.o_proj"),
        (None, ["q_proj", "v_proj"]),
    ],
)
def test_targets_by_either_name(targets, saved):
    """The config that is saved has HF's names; what it means is the same."""
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=targets))
    assert model.peft_config["default"].target_modules == saved
    again = get_peft_model(llama(), LoraConfig(r=2, target_modules=saved))
    assert get_peft_model_state_dict(model).keys() == get_peft_model_state_dict(again).keys()
    assert all(".self_attn." in key or ".mlp." in key for key in get_peft_model_state_dict(model))


@pytest.mark.parametrize(
    ("tokens", "parameters"),
    [
        ({"embed_tokens": [3, 4]}, ["q_proj.weight", "mlp.up_proj.weight"]),
        ({"tok_embeddings": [3, 4]}, ["wq.weight", "feed_forward.w3.weight"]),
        ({"model.tok_embeddings": [3, 4]}, ["attention.wq.weight", "up_proj.weight"]),
        ([3, 4], [f"model.layers.{i}.{end}.weight" for i in range(2) for end in ("attention.wq", "feed_forward.w3")]),
    ],
)
def test_tokens_and_parameters_by_either_name(tokens, parameters):
    """Whoever says them, the same layers are meant, and files have HF's names; patterns speak these, too."""
    config = LoraConfig(
        r=2,
        target_modules=["v_proj"],
        trainable_token_indices=tokens,
        target_parameters=parameters,
        rank_pattern={"q_proj.weight": 3},
    )
    model = get_peft_model(llama(), config)
    weights = get_peft_model_state_dict(model)
    below = "base_model.model.model"
    assert weights[f"{below}.embed_tokens.token_adapter.trainable_tokens_delta"].shape == (2, SIZES["hidden_size"])
    assert weights[f"{below}.layers.1.self_attn.q_proj.lora_A.weight"].shape == (3, SIZES["hidden_size"])
    assert weights[f"{below}.layers.1.mlp.up_proj.lora_A.weight"].shape == (2, SIZES["hidden_size"])
    assert len(weights) == 1 + 3 * 2 * 2
    saved = model.peft_config["default"]
    names = [*saved.target_parameters, *(saved.trainable_token_indices if isinstance(tokens, dict) else [])]
    assert not any("w" in name.rpartition(".weight")[0] or "tok_" in name for name in names), names


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"trainable_token_indices": {"wte": [1]}}, "'wte' matches none"),
        ({"trainable_token_indices": [60]}, r"model.embed_tokens: \[60\] are none of its 60 rows"),
        ({"trainable_token_indices": {"wq": [1], "q_proj": [2]}}, "name the same layer"),
        ({"target_parameters": ["wq.bias"]}, r"\['q_proj.bias'\] match none"),
        ({"target_parameters": ["attention_norm.weight"]}, r"has the shape \(32,\)"),
        ({"target_parameters": ["v_proj.weight"]}, "adapted twice"),
    ],
)
def test_tokens_and_parameters_that_are_not_there(fields: dict, error: str):
    base = llama()
    before = list(base.parameters_dict())
    with pytest.raises((ConfigError, NoMatchingPeftModuleError), match=error):
        get_peft_model(base, LoraConfig(r=2, target_modules=["v_proj"], **fields))
    assert list(base.parameters_dict()) == before


def test_trainable_tokens_alone(tmp_path: Path):
    model = get_peft_model(llama(), TrainableTokensConfig(token_indices=[3, 4, 17]))
    for p in model.trainable_params():
        p.copy_(Tensor(drawn(p.name, tuple(p.shape))))
    model.save_pretrained(tmp_path)
    keys = set(safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors"))
    assert keys == {"base_model.model.model.embed_tokens.trainable_tokens_delta"}
    assert differ(logits(model.set_train(False)), golden("lora")["base"])
    assert_same(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(model), "exact")


def test_all_linear_is_as_in_hf():
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules="all-linear", rank_pattern={"q_proj": 5}))
    keys = get_peft_model_state_dict(model)
    assert {key.split(".")[-3] for key in keys} == set(LINEAR)  # not lm_head
    assert {keys[key].shape[0] for key in keys if "q_proj.lora_A" in key} == {5}


def test_layers_trained_whole(tmp_path: Path):
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    model = get_peft_model(llama(), config)
    for p in model.trainable_params():
        p.set_data(Tensor(drawn(p.name, tuple(p.shape))))
    model.save_pretrained(tmp_path)
    keys = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    assert {"base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"} <= keys.keys()
    assert_same(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(model.set_train(False)), "exact")


def test_an_embedding_can_be_adapted(tmp_path: Path):
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False))
    assert differ(logits(model.set_train(False)), golden("lora")["base"])
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        model.save_pretrained(tmp_path)
    keys = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.model.embed_tokens.lora_embedding_A" in keys
    assert "base_model.model.model.embed_tokens.base_layer.weight" in keys
    assert_same(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(model), "exact")


def test_fused_layers_keep_their_own_name():
    """Three layers of HF are one there: its adapters must be converted first, and are not half loaded."""
    with pytest.raises(LoadError, match=r"unexpected keys .*k_proj.ia3_l"):
        PeftModel.from_pretrained(llama(qkv_concat=True), GOLDEN / "ia3")
    model = get_peft_model(llama(qkv_concat=True), LoraConfig(r=2, target_modules=["w_qkv"]))
    assert "base_model.model.model.layers.0.attention.w_qkv.lora_A.weight" in get_peft_model_state_dict(model)


def test_prompts_are_refused_before_anything_changes():
    base = llama()
    before = list(base.parameters_dict())
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ConfigError, match="does not take past_key_values"):
        get_peft_model(base, config)
    assert list(base.parameters_dict()) == before
    assert all(p.requires_grad for p in base.get_parameters())


# --- beside MindFormers' own ----------------------------------------------------------------------------------------


def pet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, targets: str) -> nn.Cell:
    """MindFormers' own LoRA; it writes a file into the working folder."""
    monkeypatch.chdir(tmp_path)
    settings = {"pet_type": "lora", "lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": targets}
    model = get_pet_model(llama(), settings)
    for p in model.trainable_params():
        p.set_data(Tensor(drawn(p.name, tuple(p.shape))))
    return model


def test_equal_to_mindformers_own_lora(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Loss and gradients; the layer with a fused activation among the targets."""
    theirs = pet(tmp_path, monkeypatch, ".*wq|.*w1|.*w2")
    config = from_pet_config(
        {"pet_type": "lora", "lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": ".*wq|.*w1|.*w2"}
    )
    ours = get_peft_model(llama(), config)
    places = {}
    for p in theirs.trainable_params():
        matrix = p.name[-1].upper()
        places[f"base_model.model.{p.name.rpartition('.')[0]}.lora_{matrix}.default.weight"] = p
    assert set(places) == {p.name for p in ours.trainable_params()}
    for p in ours.trainable_params():
        p.set_data(Tensor(places[p.name].asnumpy().copy()))
    results = [
        step(ours, ours.trainable_params()),
        step(theirs, [places[p.name] for p in ours.trainable_params()]),
    ]
    (mine, gradients), (wanted, their_gradients) = results
    assert_same(mine, wanted)
    for ours_, theirs_ in zip(gradients, their_gradients):
        assert_same(ours_, theirs_, "gradient")
    assert any(differ(gradient, np.zeros_like(array(gradient))) for gradient in gradients)


def test_training_lowers_the_loss_and_moves_the_adapter_alone():
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["wq", "w1"]))
    before = {name: array(p) for name, p in model.parameters_and_names()}
    optimizer = nn.Adam(model.trainable_params(), 1e-2)
    losses = []
    for _ in range(4):
        loss, gradients = step(model, model.trainable_params())
        optimizer(gradients)
        losses.append(float(loss))
    assert losses == sorted(losses, reverse=True)
    moved = {name for name, p in model.parameters_and_names() if not np.array_equal(array(p), before[name])}
    assert moved == {p.name for p in model.trainable_params()}
    assert_same(logits(model.unload().set_train(False)), golden("lora")["base"], "merge")


# --- layers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transpose_b", [True, False])
@pytest.mark.parametrize("activation", [None, "sigmoid"])
def test_every_layout_of_linear(mode: str, transpose_b: bool, activation: str | None):
    class Net(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Linear(6, 8, transpose_b=transpose_b, activation=activation, compute_dtype=ms.float32)

        def construct(self, x: Tensor) -> Tensor:
            return self.layer(x)

    x = Tensor(drawn("x", (2, 3, 6)) * 3)
    net = Net()
    net.layer.weight.set_data(Tensor(drawn("w", tuple(net.layer.weight.shape)) * 3))
    net.layer.bias.set_data(Tensor(drawn("b", (8,))))
    w = array(net.layer.weight)
    model = get_peft_model(net, LoraConfig(r=2, lora_alpha=4, target_modules=["layer"], init_lora_weights=False))
    assert not model.peft_config["default"].fan_in_fan_out
    a, b = (array(model.layer.get_delta_weight("default")), array(net.layer.bias))
    y = array(x) @ (w + a).T + b if transpose_b else array(x) @ (w + a) + b
    wanted = (1 / (1 + np.exp(-y)) if activation else y).astype(np.float32)
    assert_same(model(x), wanted, "merge")
    model.merge_adapter()
    assert_same(model(x), wanted, "merge")


def test_layers_of_experts_are_refused():
    class Net(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Linear(6, 8, expert_num=2, compute_dtype=ms.float32)

    with pytest.raises(ConfigError, match=r"layer \(Linear\) is not supported"):
        get_peft_model(Net(), LoraConfig(target_modules=["layer"]))


@pytest.fixture
def semi_auto() -> Iterator[None]:
    ms.set_auto_parallel_context(parallel_mode="semi_auto_parallel")
    yield
    ms.reset_auto_parallel_context()


@pytest.mark.parametrize("transpose_b", [True, False])
def test_strategies_are_inherited(semi_auto: None, transpose_b: bool):
    """As MindFormers' own adapter has them: the input's division for A, the output's for B and for the sum."""
    layer = Linear(6, 8, transpose_b=transpose_b, has_bias=False, compute_dtype=ms.float16)
    layer.shard(((2, 3), (4, 3) if transpose_b else (3, 4)))
    op = describe(layer, "layer").op
    found = {name: getattr(op, name).in_strategy for name in ("whole", "matmul", "mixing", "sum")}
    assert found == {
        "whole": ((2, 3), (4, 3)),
        "matmul": ((2, 3), (1, 3)),
        "mixing": ((2, 1), (4, 1)),
        "sum": ((2, 4), (2, 4)),
    }
    assert op(Tensor(np.ones((2, 6), np.float32)), Tensor(np.ones((8, 6), np.float32))).dtype == ms.float32


class Paired(nn.Cell):
    """One layer that returns a pair, in a Cell that adds what is left to it."""

    def __init__(self, kind: type, skip_bias_add: bool) -> None:
        super().__init__()
        sizes = TransformerConfig(
            num_layers=1, num_attention_heads=2, hidden_size=6, params_dtype="float32", compute_dtype="float32"
        )

        def init(shape: tuple[int, ...]) -> Tensor:
            return Tensor(drawn("init", tuple(shape)))

        self.layer = kind(6, 8, config=sizes, init_method=init, bias=True, bias_init=init, skip_bias_add=skip_bias_add)

    def construct(self, x: Tensor) -> Tensor:
        y, bias = self.layer(x)
        return y if bias is None else ops.add(y, bias)


@pytest.mark.graph
@pytest.mark.parametrize("skip_bias_add", [True, False])
@pytest.mark.parametrize("kind", [ColumnParallelLinear, RowParallelLinear])
def test_layers_that_return_pairs(kind: type, skip_bias_add: bool):
    """The newer models' layers, which run in graph mode alone; some leave the bias to their caller."""
    ms.set_context(mode=ms.GRAPH_MODE)
    x = Tensor(drawn("x", (3, 2, 6)))
    net = Paired(kind, skip_bias_add)
    plain = array(net(x))
    w, b = array(net.layer.weight), array(net.layer.bias)
    assert_same(plain, array(x) @ w.T + b, "merge")
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False))
    adapted = array(x) @ (w + array(model.layer.get_delta_weight("default"))).T + b
    assert_same(model(x), adapted, "merge")

    def total(x: Tensor) -> Tensor:
        return ops.reduce_sum(model(x))

    down, up = ms.grad(total, None, model.trainable_params())(x)
    h = array(x).reshape(-1, 6) @ array(model.layer.lora_A["default"].weight).T
    assert_same(up, np.tile(model.layer.scaling["default"] * h.sum(0), (8, 1)).astype(np.float32), "gradient")
    assert differ(down, np.zeros_like(array(down)))
    with model.disable_adapter():
        assert_same(model(x), plain)
    model.merge_adapter()
    assert_same(model(x), adapted, "merge")


CHANGE_THE_BIAS = [
    BOFTConfig(boft_block_size=2),
    GloraConfig(r=2),
    IA3Config(feedforward_modules=[]),
    LNTuningConfig(),
    RoadConfig(group_size=2),
    ShiraConfig(r=1),
    LoraConfig(use_dora=True),
    BeftConfig(),
    BitFitConfig(),
]


@pytest.mark.graph
@pytest.mark.parametrize("config", CHANGE_THE_BIAS, ids=lambda config: config.peft_type)
def test_a_bias_that_is_left_to_the_caller_is_changed_too(config: PeftConfig):
    ms.set_context(mode=ms.GRAPH_MODE)
    net = Paired(ColumnParallelLinear, skip_bias_add=True)
    x = Tensor(drawn("x", (3, 2, 6)))
    plain = array(net(x))
    config.target_modules = ["layer"]
    model = get_peft_model(net, config)
    assert_same(model(x), plain, "merge")
    for p in model.trainable_params():
        p.copy_(Tensor(array(p) + 0.3 * drawn(p.name, tuple(p.shape))))
    adapted = array(model(x))
    assert differ(adapted, plain)
    with model.disable_adapter():
        assert_same(model(x), plain, "merge")
    model.merge_adapter()
    assert_same(model(x), adapted, "merge")


def test_feedforward_layers_by_either_name():
    model = get_peft_model(llama(), IA3Config(target_modules=["wk", "w2"], feedforward_modules=["w2"]))
    assert model.peft_config["default"].feedforward_modules == ["down_proj"]
    layer = model.get_base_model().model.layers[0].feed_forward.w2
    assert array(layer.ia3_l["default"]).shape == (1, SIZES["intermediate_size"])  # the inputs, as of a feedforward


# --- the way in -----------------------------------------------------------------------------------------------------


def test_the_auto_class(tmp_path: Path):
    """MindFormers' own Auto class reads its own folders, not HF's; what it says of those is passed on."""
    llama().save_pretrained(str(tmp_path / "base"))
    model = PeftModel.from_pretrained(llama(), GOLDEN / "lora")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", provider="mindformers")
    assert isinstance(loaded.get_base_model(), LlamaForCausalLM)
    for name, value in get_peft_model_state_dict(loaded).items():
        assert_same(value, get_peft_model_state_dict(model)[name], "exact")
    (tmp_path / "base" / "mindspore_model.ckpt").unlink()
    with pytest.raises(NoBaseModelError, match=r"mindformers\.AutoModelForCausalLM cannot load it"):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", provider="mindformers")


def test_pruned_ranks_are_told_by_hfs_names(tmp_path: Path):
    targets = ["q_proj", "v_proj"]
    model = get_peft_model(
        llama(), AdaLoraConfig(target_modules=targets, init_r=3, target_r=1, total_step=4, tfinal=1)
    )
    rng = np.random.default_rng(0)
    for p in model.trainable_params():
        p.copy_(Tensor(rng.normal(size=p.shape).astype(np.float32)))
    for step in range(1, 4):
        gradients = [Tensor(rng.normal(size=p.shape).astype(np.float32)) for p in model.trainable_params()]
        model.base_model.update_and_allocate(step, gradients)
    model.save_pretrained(tmp_path)
    pattern = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    assert sorted(pattern) == [f"model.layers.{i}.self_attn.{name}.lora_E" for i in range(2) for name in targets]
    assert_same(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(model), "merge")
