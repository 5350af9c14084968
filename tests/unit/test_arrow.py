"""Arrow: routing among LoRA adapters, its formula said once more in numpy, and what is refused."""

from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from msft_peft import ArrowConfig, ConfigError, LoraConfig, MergeError, PeftModel, create_arrow_model, get_peft_model
from tests import nets
from tests.cases import layers_of, output, shake, state_of, weights_of
from tests.tolerances import array, assert_same, differ

TARGETS = ["lin0", "lin1"]


def dense() -> nn.Cell:
    ms.set_seed(5)
    return nets.Dense().set_train(False)


def saved(folder: Path, count: int, **settings: object) -> list[str]:
    """Paths of so many random adapters."""
    paths = []
    for i in range(count):
        config = LoraConfig(**{"r": 2, "lora_alpha": 3 + i, "target_modules": TARGETS} | settings)
        model = get_peft_model(dense(), config)
        number = len(list(folder.iterdir()))
        shake(weights_of(model, "default"), seed=10 + number)
        path = folder / f"{number}"
        model.save_pretrained(path)
        paths.append(str(path))
    return paths


def routed(folder: Path, count: int = 3, general: int = 0, **settings: object) -> PeftModel:
    config = ArrowConfig(**{"top_k": 2, "use_gks": general > 0} | settings)
    return create_arrow_model(dense(), saved(folder, count), config, saved(folder, general)).set_train(False)


def by_hand(layer, x: np.ndarray, general: list[str] = (), top_k: int = 2, temperature: float = 1.0) -> np.ndarray:
    """What the router adds to the layer's output."""
    factors = {
        name: (array(patch.lora_A), array(patch.lora_B), float(patch.scaling)) for name, patch in layer.held().items()
    }
    mean_a, mean_b = (np.mean([factors[name][i] for name in general], 0) if general else 0 for i in (0, 1))
    tasks = [(a - mean_a, b - mean_b, s) for name, (a, b, s) in factors.items() if name.startswith("task")]
    rows = []
    for token in x:
        affinity = np.array([abs(token @ np.linalg.svd(b @ a)[2][0]) for a, b, _ in tasks])
        score = np.exp(affinity / temperature)
        score[affinity < np.sort(affinity)[-top_k]] = 0
        rows.append(sum(c * s * b @ a @ token for c, (a, b, s) in zip(score / score.sum(), tasks)))
    return np.stack(rows)


@pytest.mark.parametrize("general", [0, 2])
def test_tokens_go_to_the_adapters_that_they_are_nearest_to(general: int, mode: str, tmp_path: Path):
    model = routed(tmp_path, general=general, router_temperature=0.5)
    base = model.get_base_model()
    layer, x = base.lin0, nets.floats(7, 6, seed=4)
    names = [f"gks_{i}" for i in range(general)]
    expected = array(layer.base_layer(x)) + by_hand(layer, array(x), names, temperature=0.5)
    assert_same(layer(x), expected)
    stacked = ops.reshape(Tensor(array(x)[:6]), (2, 3, 6))
    assert_same(array(layer(stacked)).reshape(6, -1), expected[:6])


def test_the_adapters_themselves_stay_as_they_are(tmp_path: Path):
    model = routed(tmp_path, general=2)
    assert model.active_adapters == ["arrow_router"]
    assert not model.trainable_params()
    alone = PeftModel.from_pretrained(dense(), tmp_path / "0")
    model.set_adapter("task_0")
    assert_same(output(model), output(alone))


def test_the_router_knows_of_each_change(mode: str, tmp_path: Path):
    """An adapter added, swapped for another one, deleted: in use meanwhile, also in compiled code."""
    model = routed(tmp_path)
    layer, x = model.get_base_model().lin0, nets.floats(7, 6, seed=4)
    layers = layers_of(model)

    def check() -> np.ndarray:
        y = array(layer(x)) - array(layer.base_layer(x))
        assert_same(y, by_hand(layer, array(x)))
        return y

    three = check()
    model.load_adapter(saved(tmp_path, 5)[4], "task_new")
    assert all(layer.adapters["arrow_router"].prototypes.rows.shape[0] == 5 for layer in layers)
    four = check()
    assert differ(three, four)
    model.load_adapter(saved(tmp_path, 7)[6], "task_new")
    assert differ(check(), four)
    model.delete_adapter("task_new")
    assert_same(check(), three)


def test_gradients_go_through_the_router_to_its_input(tmp_path: Path):
    model = routed(tmp_path)
    x = nets.floats(3, 6, seed=4)

    def loss(x):
        return ops.reduce_sum(ops.square(model(x)))

    gradient = ms.grad(loss)
    step = 1e-3
    direction = nets.floats(3, 6, seed=5)
    slope = (float(loss(x + step * direction)) - float(loss(x - step * direction))) / (2 * step)
    assert float(ops.reduce_sum(gradient(x) * direction)) == pytest.approx(slope, rel=2e-2)
    assert_same(ms.jit(gradient)(x), gradient(x), "gradient")


def test_rows_of_a_batch_may_be_routed(mode: str, tmp_path: Path):
    model = routed(tmp_path)
    x = nets.floats(3, 6, seed=4)
    expected = {"__base__": array(model.get_base_model().lin0.base_layer(x))}
    with model.disable_adapter():
        expected["__base__"] = array(model(x))
    for name in ("arrow_router", "task_1"):
        model.set_adapter(name)
        expected[name] = array(model(x))
    names = ["task_1", "arrow_router", "__base__"]
    mixed = array(model(x, adapter_names=names))
    for row, name in enumerate(names):
        assert_same(mixed[row], expected[name][row])


def test_a_router_is_saved_and_loaded_beside_its_adapters(tmp_path: Path):
    model = routed(tmp_path, general=1)
    model.save_pretrained(tmp_path / "all")
    again = PeftModel.from_pretrained(dense(), tmp_path / "all" / "arrow_router", "arrow_router")
    with pytest.raises(ValueError, match=r"needs the general adapters \['gks_0'\], which are not there"):
        output(again)
    for name in ("gks_0", "task_0", "task_1", "task_2"):
        again.load_adapter(tmp_path / "all" / name, name)
    assert_same(output(again), output(model))
    assert again.peft_config["arrow_router"].arrow_config == model.peft_config["arrow_router"].arrow_config


def test_a_router_is_not_merged(tmp_path: Path):
    model = routed(tmp_path)
    before = output(model)
    with pytest.raises(MergeError, match="Cannot merge an active Arrow router adapter"):
        model.merge_adapter()
    assert_same(output(model), before, "exact")


def test_without_adapters_to_choose_from_it_says_so():
    model = get_peft_model(dense(), LoraConfig(target_modules=TARGETS, arrow_config=ArrowConfig()))
    with pytest.raises(ValueError, match="lin0 is to choose top_k=3 of 0 adapters"):
        output(model)
    for name in ("a", "b", "c"):
        model.add_adapter(name, LoraConfig(target_modules=TARGETS, use_dora=name == "c"))
    with pytest.raises(ValueError, match="plain LoRA adapters only, and 'c' is none"):
        output(model)
    model.delete_adapter("c")
    model.add_adapter("c", LoraConfig(target_modules=TARGETS, r=2))
    with pytest.raises(ValueError, match="adapters of one rank"):
        output(model)


REFUSED = {
    "no path": ({}, 0, {}, {}, ConfigError, "should contain at least one"),
    "no general path": ({"use_gks": True, "top_k": 1}, 2, {}, {}, ConfigError, "provide general LoRA paths"),
    "too few": ({"top_k": 3}, 2, {}, {}, ConfigError, "top_k=3, but there are only 2"),
    "another rank": ({"top_k": 1}, 1, {"r": 4}, {}, ConfigError, "rank mismatch"),
    "other layers": ({"top_k": 1}, 1, {"target_modules": ["lin0"]}, {}, ConfigError, r"mismatch: \['lin1'\]"),
    "no plain LoRA": ({"top_k": 1}, 1, {"use_dora": True}, {}, TypeError, "must only target Linear-like layers"),
    "no such folder": ({"top_k": 1}, 1, {}, {"subfolder": "nothing"}, ConfigError, "adapter_config.json"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_is_refused_leaves_the_model_alone(case: tuple, tmp_path: Path):
    settings, count, other, options, kind, text = case
    paths = [*saved(tmp_path, count), *(saved(tmp_path, 1, **other) if other else [])]
    net = dense().set_train(True)
    net.lin1.set_train(False)
    before = state_of(net)
    with pytest.raises(kind, match=text):
        create_arrow_model(net, paths, ArrowConfig(**settings), **options)
    assert state_of(net) == before
    assert [cell.training for cell in (net, net.lin0, net.lin1)] == [True, True, False]


def test_adapters_that_are_there_already_are_left_alone(tmp_path: Path):
    paths = saved(tmp_path, 2)
    mine = get_peft_model(dense(), LoraConfig(target_modules=TARGETS), "mine")
    shake(weights_of(mine, "mine"))
    before, expected = state_of(mine), output(mine)
    for model in (mine, mine.get_base_model()):
        with pytest.raises(ConfigError, match=r"a model without adapters, and this one has \['mine'\]: unload\(\)"):
            create_arrow_model(model, paths, ArrowConfig(top_k=1))
    assert state_of(mine) == before
    assert_same(output(mine), expected)
    assert create_arrow_model(mine.unload(), paths, ArrowConfig(top_k=1)).active_adapters == ["arrow_router"]


@pytest.mark.parametrize("settings", [{"top_k": 0}, {"top_k": 1.5}, {"router_temperature": 0.0}])
def test_bad_numbers_are_refused_at_once(settings: dict):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        ArrowConfig(**settings)


def test_a_folder_without_an_adapter_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"does not contain 'adapter_config\.json'"):
        create_arrow_model(dense(), [tmp_path], ArrowConfig(top_k=1))
