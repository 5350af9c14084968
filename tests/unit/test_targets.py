"""Which layers a config means."""

from typing import Any

import pytest
from mindspore import nn

from msft_peft import LoraConfig, NoMatchingPeftModuleError, get_peft_model
from msft_peft.core.layer import TunerLayer
from msft_peft.core.targets import match_pattern
from tests import nets

Q = ["layers.0.attn.q", "layers.1.attn.q"]
V = ["layers.0.attn.v", "layers.1.attn.v"]
MLP = ["layers.0.mlp", "layers.1.mlp"]


class Model(nn.Cell):
    """Blocks one level down, under an output head that the model names: as language models are built."""

    def __init__(self, names_head: bool = True) -> None:
        super().__init__()
        self.model = nets.Blocks()
        self.lm_head = nn.Dense(3, 5)
        if names_head:
            self.get_output_embeddings = lambda: self.lm_head


class Experts(nn.Cell):
    """A mixture of experts: a second number in the path."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Cell()
        self.model.layers = nn.CellList([nn.Cell(), nn.Cell()])
        for layer in self.model.layers:
            layer.experts = nets.Containers()


class Classified(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Dense(6, 8)
        self.classifier = nn.Dense(8, 3)
        self.score = nn.Dense(8, 3)


def targeted(net: nn.Cell, **settings: Any) -> list[str]:
    get_peft_model(net, LoraConfig(r=1, **settings))
    return sorted(path for path, cell in net.cells_and_names() if isinstance(cell, TunerLayer))


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q"], Q),
        (["q", "v"], Q + V),
        (("attn.q",), Q),
        ({"layers.1.attn.q"}, Q[1:]),
        (["0.attn.q", "head"], [*Q[:1], "head"]),
        (r"layers\.0\.attn\.(q|v)", [Q[0], V[0]]),
        (r".*\.[qv]", Q + V),
        ("head", ["head"]),
        ("all-linear", [*Q, *V, *MLP, "head"]),
        ("ALL-Linear", [*Q, *V, *MLP, "head"]),
    ],
    ids=str,
)
def test_names_ends_of_paths_and_regexes(targets: Any, expected: list[str]):
    assert targeted(nets.Blocks(), target_modules=targets) == sorted(expected)


@pytest.mark.parametrize(
    "targets", [["ttn.q"], ["layers.0"], ["ead"], ["Q"], "q", r"attn\.q", "layers.0.attn", "", []]
)
def test_parts_of_names_are_not_enough(targets: Any):
    kinds = (NoMatchingPeftModuleError, ValueError)
    with pytest.raises(kinds, match=r"not found in the base model|not supported|specify `target_modules`"):
        targeted(nets.Blocks(), target_modules=targets)


@pytest.mark.parametrize(
    ("excluded", "expected"),
    [
        (["layers.0.attn.q"], [Q[1], *V]),
        (["v"], Q),
        (r"layers\.1\..*", [Q[0], V[0]]),
        (["attn.v", "head"], Q),
    ],
    ids=str,
)
def test_exclusion_wins(excluded: Any, expected: list[str]):
    found = targeted(nets.Blocks(), target_modules=["q", "v"], exclude_modules=excluded)
    assert found == sorted(expected)


def test_excluding_nothing_warns():
    with pytest.warns(UserWarning, match=r"You have passed exclude_modules=\['nope'\] but no modules were excluded."):
        assert targeted(nets.Blocks(), target_modules=["q"], exclude_modules=["nope"]) == Q


def test_excluding_everything_raises():
    with pytest.raises(NoMatchingPeftModuleError, match=r"All modules were excluded. This is likely unintended"):
        targeted(nets.Blocks(), target_modules=["q"], exclude_modules=".*")
    with pytest.raises(NoMatchingPeftModuleError, match="All modules were excluded"):
        targeted(nets.Blocks(), target_modules=["head"], modules_to_save=["head"])


def test_a_layer_trained_whole_carries_no_adapter():
    found = targeted(nets.Blocks(), target_modules="all-linear", modules_to_save=["attn"])
    assert found == sorted([*MLP, "head"])


@pytest.mark.parametrize("model_type", [None, "llama"])
def test_all_linear_leaves_the_output_head_alone(model_type: str | None):
    lm = targeted(Model(), target_modules="all-linear")
    assert lm == sorted(f"model.{path}" for path in (*Q, *V, *MLP, "head"))
    assert "lm_head" in targeted(Model(names_head=False), target_modules="all-linear")


def test_all_linear_leaves_a_classifiers_head_alone():
    assert targeted(Classified(), target_modules="all-linear") == ["backbone", "classifier", "score"]
    found = targeted(Classified(), target_modules="all-linear", task_type="SEQ_CLS")
    assert found == ["backbone"]


def test_all_linear_on_a_model_that_has_adapters_already():
    model = get_peft_model(
        nets.Classifier(), LoraConfig(r=1, target_modules="all-linear", modules_to_save=["classifier"])
    )
    model.add_adapter("other", LoraConfig(r=1, target_modules="all-linear"))
    held = {path: set(cell.held()) for path, cell in model.cells_and_names() if isinstance(cell, TunerLayer)}
    assert held.pop("base_model.model.backbone") == {"default", "other"}
    # What the first adapter trains whole is left alone: its original stays frozen, and a copy is no target.
    assert not any("modules_to_save" in path for path in held)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"layers_to_transform": 1}, ["model.layers.1.attn.q"]),
        ({"layers_to_transform": [0]}, ["model.layers.0.attn.q"]),
        ({"layers_to_transform": [1, 0, 5]}, ["model.layers.0.attn.q", "model.layers.1.attn.q"]),
        ({"layers_to_transform": []}, ["model.layers.0.attn.q", "model.layers.1.attn.q"]),
        ({"layers_to_transform": 0, "layers_pattern": "layers"}, ["model.layers.0.attn.q"]),
        ({"layers_to_transform": 0, "layers_pattern": ["h", "layers"]}, ["model.layers.0.attn.q"]),
    ],
    ids=str,
)
def test_blocks_by_number(settings: dict[str, Any], expected: list[str]):
    assert targeted(Model(), target_modules=["q"], **settings) == expected


def test_blocks_of_another_list_are_not_meant():
    with pytest.raises(NoMatchingPeftModuleError, match=r"layers_to_transform=0 and layers_pattern='h' were applied"):
        targeted(Model(), target_modules=["q"], layers_to_transform=0, layers_pattern="h")


def test_the_first_number_in_a_path_counts():
    found = targeted(Experts(), target_modules=["stack.0", "stack.1"], layers_to_transform=1)
    assert found == ["model.layers.1.experts.stack.0", "model.layers.1.experts.stack.1"]
    found = targeted(Experts(), target_modules=["stack.1"], layers_to_transform=0, layers_pattern="layers")
    assert found == ["model.layers.0.experts.stack.1"]


DEFAULTS = {
    "llama": ["q_proj", "v_proj"],
    "mistral": ["q_proj", "v_proj"],
    "qwen2": ["q_proj", "v_proj"],
    "qwen3": ["q_proj", "v_proj"],
    "gpt2": ["c_attn"],
    "bert": ["query", "value"],
    "roberta": ["query", "value"],
    "t5": ["q", "v"],
    "bloom": ["query_key_value"],
}


@pytest.mark.parametrize(("model_type", "expected"), DEFAULTS.items())
def test_default_targets(model_type: str, expected: list[str]):
    net = nn.Cell()
    net.config = {"model_type": model_type}
    net.block = nn.CellDict(
        {name: nn.Dense(2, 2) for name in ("q_proj", "v_proj", "k_proj", "c_attn", "query", "value")}
    )
    for name in ("q", "v", "query_key_value"):
        net.block[name] = nn.Dense(2, 2)
    assert targeted(net) == sorted(f"block.{name}" for name in expected)


def test_default_targets_from_a_config_object():
    class Config:
        def to_dict(self) -> dict[str, Any]:
            return {"model_type": "t5"}

    net = nets.Blocks()
    net.config = Config()
    assert targeted(net) == sorted(Q + V)


def test_an_architecture_without_defaults_is_told_what_there_is():
    text = r"Please specify `target_modules` in `peft_config`.*Blocks.*model_type='custom'.*: head, mlp, q, v\."
    with pytest.raises(ValueError, match=text):
        targeted(nets.Blocks())
    with pytest.raises(ValueError, match="model_type='mystery'"):
        targeted(nets.Blocks(model_type="mystery"))


def test_the_error_says_how_many_modules_and_which_are_near():
    with pytest.raises(NoMatchingPeftModuleError) as error:
        targeted(nets.Blocks(), target_modules=["q_proj", "heads"])
    text = str(error.value)
    assert text.startswith("Target modules ['heads', 'q_proj'] not found in the base model")
    assert "Nearest names: head" in text
    assert "Please check the target modules and try again" in text


def test_kinds_that_no_adapter_can_have_are_named():
    with pytest.raises(ValueError, match=r"Target module norm \(LayerNorm\) is not supported. Currently, only"):
        targeted(nets.Norms(), target_modules=["norm", "lin"])


def test_one_bad_target_among_good_ones_is_matched_as_in_hf():
    assert targeted(nets.Blocks(), target_modules=["q", "no_such_layer"]) == Q


def test_patterns_that_match_nothing_are_named():
    for field in ("rank_pattern", "alpha_pattern"):
        text = rf"The following {field} keys did not match any targeted module and were ignored: \['v', 'zz'\]"
        with pytest.warns(RuntimeWarning, match=text):
            targeted(nets.Blocks(), target_modules=["q"], **{field: {"zz": 2, "q": 3, "v": 4}})


@pytest.mark.parametrize(
    ("pattern", "path", "matches"),
    [
        ("q", "layers.0.attn.q", True),
        ("q", "q", True),
        ("attn.q", "layers.0.attn.q", True),
        ("layers.0.attn.q", "layers.0.attn.q", True),
        (r"^layers\.0\..*", "layers.0.attn.q", True),
        (r"layers\.\d\.attn\.q", "model.layers.1.attn.q", True),
        ("q", "layers.0.attn.xq", False),
        ("attn", "layers.0.attn.q", False),
        ("q|v", "layers.0.attn.v", True),
    ],
)
def test_patterns(pattern: str, path: str, matches: bool):
    assert match_pattern({"other": 1, pattern: 2}, path, 3) == (2 if matches else 3)


def test_the_first_pattern_wins():
    assert match_pattern({".*q": 1, "q": 2}, "a.q", 3) == 1


@pytest.mark.parametrize(("net", "said"), [(nets.Gpt2, False), (nets.Blocks, True)])
def test_fan_in_fan_out_follows_the_layer_with_a_warning(net: type, said: bool):
    targets = ["c_attn"] if net is nets.Gpt2 else ["q"]
    kind = "Conv1D" if net is nets.Gpt2 else "torch.nn.Linear"
    with pytest.warns(
        UserWarning, match=f"fan_in_fan_out is set to {said} but the target module is `{kind}`. Setting"
    ):
        model = get_peft_model(net(), LoraConfig(target_modules=targets, fan_in_fan_out=said))
    assert model.peft_config["default"].fan_in_fan_out is not said
