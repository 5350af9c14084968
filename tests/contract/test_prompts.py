"""What every method that puts something before the input has in common: training, switches, files, failures."""

import shutil
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from msft_peft import (
    AdapterNameError,
    ConfigError,
    LoadError,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)
from msft_peft.backend.graphs import compiled_count
from msft_peft.core.prompt import PREFIX_STATES
from tests import nets
from tests.cases import Case, in_pynative, prompt_cases, shake, state_of, weights_of
from tests.tolerances import array, assert_same, differ


@pytest.fixture(params=prompt_cases(), ids=lambda case: case.note)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def is_prefix(case: Case) -> bool:
    return case.method.prompt.argument == PREFIX_STATES


def inputs(case: Case) -> dict[str, Tensor]:
    tasks = {"task_ids": Tensor([1, 0], ms.int32)} if case.method.prompt.in_decoder else {}
    return {
        "input_ids": case.base().sample(),
        "attention_mask": Tensor([[1] * 5, [1] * 3 + [0] * 2], ms.int32),
    } | tasks


def logits(model: nn.Cell, case: Case) -> np.ndarray:
    """In the mode that the test runs in."""
    return array(model(**inputs(case))["logits"])


def base_logits(case: Case) -> np.ndarray:
    with in_pynative():
        return array(case.base()(**{key: x for key, x in inputs(case).items() if key != "task_ids"})["logits"])


def expected(model: nn.Cell, case: Case) -> np.ndarray:
    with in_pynative():
        return logits(model, case)


def trained(case: Case, name: str = "default") -> list[str]:
    """Names of what an adapter trains, told by its class and its heads."""
    twin = case.adapted(name)
    frozen = {f"prompt_encoder.{name}.{path}" for path in case.method.prompt.frozen}
    return sorted({p.name for p in weights_of(twin, name)} - frozen)


class Loss(nn.Cell):
    """The mean square of the logits, or for CPT its own loss."""

    def __init__(self, model: nn.Cell, own: bool) -> None:
        super().__init__(auto_prefix=False)
        self.model, self.own = model, own

    def construct(self, input_ids: Tensor, attention_mask: Tensor, task_ids: Tensor) -> Tensor:
        if self.own:
            return self.model(input_ids=input_ids, attention_mask=attention_mask, labels=input_ids % 3)["loss"]
        y = self.model(input_ids=input_ids, attention_mask=attention_mask, task_ids=task_ids)["logits"]
        return ops.square(ops.cast(y, ms.float32)).mean()


def loss_of(model: nn.Cell, case: Case) -> Loss:
    return Loss(model, case.method.prompt.own_loss)


def batch(case: Case) -> tuple[Tensor, ...]:
    given = {"task_ids": Tensor([1, 0], ms.int32)} | inputs(case)
    return tuple(given[key] for key in ("input_ids", "attention_mask", "task_ids"))


def test_it_stands_before_the_input(case: Case):
    model, base = case.adapted(), base_logits(case)
    n = model.peft_config["default"].num_virtual_tokens
    y = logits(model, case)
    if is_prefix(case) or ("classifier" in case.whole and y.ndim == 2):
        assert y.shape == base.shape
        assert differ(y, base)
    else:
        assert y.shape == (base.shape[0], base.shape[1] + n, base.shape[2])
        assert differ(y[:, n:], base)
    assert model.base_model is model.get_base_model()
    assert y.dtype == base.dtype


def test_exactly_the_prompt_and_the_heads_train(case: Case):
    model = case.adapted()
    assert sorted(p.name for p in model.trainable_params()) == trained(case)
    assert [p.name for p in model.get_parameters()] == [path for path, _ in model.parameters_and_names()]
    heads = {p.name for p in model.trainable_params() if not p.name.startswith("prompt_encoder.default.")}
    whole = {f"base_model.{path}.modules_to_save.default.{leaf}" for path in case.whole for leaf in ("weight", "bias")}
    assert heads == whole
    frozen = get_peft_model(case.base(), case.config(inference_mode=True))
    assert frozen.trainable_params() == []


def test_a_compiled_step_moves_the_prompt_and_nothing_else(case: Case, mode: str):
    model = case.adapted().set_train(True)
    before = {p.name: array(p) for p in model.get_parameters()}
    optimizer = nn.SGD(model.trainable_params(), 0.1)
    gradient = ms.value_and_grad(loss_of(model, case), None, optimizer.parameters)
    with in_pynative():
        value, wanted = gradient(*batch(case))

    def step(*columns: Tensor) -> Any:
        loss, grads = gradient(*columns)
        optimizer(grads)
        return loss, grads

    run = ms.jit(step) if mode == "graph" else step
    loss, grads = run(*batch(case))
    assert_same(loss, value, "gradient")
    for p, ours, theirs in zip(optimizer.parameters, grads, wanted):
        assert (array(theirs) != 0).any(), p.name
        assert_same(ours, theirs, "gradient")
    for p in model.get_parameters():
        assert p.requires_grad == (array(p) != before[p.name]).any(), p.name
    count = compiled_count()
    run(*batch(case))
    assert compiled_count() == count


def test_switches_are_seen_in_both_modes(case: Case, mode: str):
    base = base_logits(case)
    model = case.pair()
    assert model.active_adapters == ["one"]
    one = logits(model, case)
    assert_same(one, expected(model, case))
    assert not [p for p in weights_of(model, "two") if p.requires_grad]
    with model.disable_adapter():
        assert not model.has_active_enabled_adapter
        assert_same(logits(model, case), base)
        with model.disable_adapter():
            assert_same(expected(model, case), base)
        assert_same(expected(model, case), base)
    assert_same(logits(model, case), one)
    model.set_adapter("two")
    assert sorted(p.name for p in model.trainable_params()) == trained(case, "two")
    two = logits(model, case)
    assert differ(two, one)
    with pytest.warns(UserWarning, match="Adapter two was active which is now deleted. Setting active adapter to one"):
        model.delete_adapter("two")
    assert_same(logits(model, case), one)
    assert weights_of(model, "two") == []
    model.delete_adapter("one")
    assert_same(logits(model, case), base)
    assert (model.active_adapters, model.trainable_params()) == ([], [])
    model.add_adapter("two", case.config())
    model.set_adapter("two")
    shake(weights_of(model, "two"), seed=2)
    assert_same(logits(model, case), expected(model, case))
    assert differ(logits(model, case), one)


def test_what_is_refused_changes_nothing(case: Case, tmp_path: Path):
    model = case.pair()
    model.save_pretrained(tmp_path)
    shutil.copytree(tmp_path / "one", tmp_path / "empty")
    (tmp_path / "empty" / "adapter_model.safetensors").unlink()
    (tmp_path / "empty" / "adapter_model.ckpt").unlink()
    before = state_of(model)
    refusals = (
        (AdapterNameError, "not found", lambda: model.set_adapter("nope")),
        (AdapterNameError, "does not exist", lambda: model.delete_adapter("nope")),
        (AdapterNameError, "already exists", lambda: model.add_adapter("two", case.config())),
        (ConfigError, "different peft types", lambda: model.add_adapter("three", LoraConfig(target_modules=["qkv"]))),
        (FileNotFoundError, "no adapter weights", lambda: model.load_adapter(tmp_path / "empty", "three")),
        (TypeError, "takes one name", lambda: model.set_adapter(["one", "two"])),
        (ConfigError, "does not go with prompts", lambda: model(adapter_names=["one", "two"], **inputs(case))),
        (AttributeError, "nothing to merge", lambda: model.merge_and_unload()),
        (
            AttributeError,
            "no layers to switch",
            lambda: model.disable_adapter_layers(),
        ),
        (AttributeError, "nothing to merge", lambda: model.unload()),
        (TypeError, "have none there", lambda: model.get_layer_status()),
        (TypeError, "have none there", lambda: model.get_model_status()),
    )
    for kind, text, call in refusals:
        with pytest.raises(kind, match=text):
            call()
    assert state_of(model) == before

    base = case.base()
    before = state_of(base)
    if not case.method.prompt.own_loss:
        with pytest.raises(ConfigError, match="num_virtual_tokens"):
            get_peft_model(base, case.config(num_virtual_tokens=None))
        with pytest.raises(ConfigError, match="needs a task_type"):
            get_peft_model(base, case.config(task_type=None))
    with pytest.raises(ConfigError, match="not compatible with the `PeftMixedModel`"):
        get_peft_model(base, case.config(), mixed=True)
    plain = nets.Dense()
    with pytest.raises(ConfigError, match=r"cannot be used with Dense: .* Add an argument"):
        get_peft_model(plain, case.config())
    assert state_of(base) == before


def test_files_there_and_back(case: Case, mode: str, tmp_path: Path):
    model = case.adapted()
    y = expected(model, case)
    model.save_pretrained(tmp_path / "a")
    names = {"README.md", "adapter_config.json", "adapter_model.ckpt", "adapter_model.safetensors"}
    made = model.prompt_encoder["default"].reparametrised
    assert {path.name for path in (tmp_path / "a").iterdir()} == names | (
        {"prompt_encoder.safetensors"} if made else set()
    )
    again = PeftModel.from_pretrained(case.base(), tmp_path / "a", "other")
    assert type(again) is type(model)
    assert again.trainable_params() == []
    assert again.load_report.faults() == []
    assert_same(logits(again, case), y, "merge")
    again.save_pretrained(tmp_path / "b")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / "other" / name).read_bytes()
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    from_ckpt = PeftModel.from_pretrained(case.base(), tmp_path / "a")
    assert_same(expected(from_ckpt, case), y, "merge")
    assert from_ckpt.load_adapter(tmp_path / "b" / "other", "more").faults() == []
    assert from_ckpt.load_adapter(tmp_path / "b" / "other", "more").faults() == []
    from_ckpt.set_adapter("more")
    assert_same(expected(from_ckpt, case), y, "merge")


def test_training_goes_on_where_it_was_left(case: Case, tmp_path: Path):
    model = case.adapted()
    y, loss = expected(model, case), loss_of(model, case)(*batch(case))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(case.base(), tmp_path, is_trainable=True)
    assert sorted(p.name for p in again.trainable_params()) == trained(case)
    assert_same(expected(again.set_train(False), case), y)
    for p in model.get_parameters():
        assert_same({q.name: q for q in again.get_parameters()}[p.name], p, "exact")
    assert_same(loss_of(again, case)(*batch(case)), loss)

    if again.prompt_encoder["default"].reparametrised:
        shake([again.prompt_encoder["default"].embedding.weight], seed=9)
        again.save_pretrained(tmp_path / "newer", save_prompt_encoder_weights=False)
        assert not (tmp_path / "newer" / "prompt_encoder.safetensors").exists()
        base = case.base()
        before = state_of(base)
        with pytest.raises(ConfigError, match="Cannot set a prompt learning adapter to trainable when loading"):
            PeftModel.from_pretrained(base, tmp_path / "newer", is_trainable=True)
        shutil.copy(tmp_path / "prompt_encoder.safetensors", tmp_path / "newer")
        with pytest.raises(LoadError, match="the files are not of one adapter"):
            PeftModel.from_pretrained(base, tmp_path / "newer", is_trainable=True)
        assert state_of(base) == before
        again.save_pretrained(tmp_path / "newer", save_prompt_encoder_weights=False)
        assert not (tmp_path / "newer" / "prompt_encoder.safetensors").exists()


def test_the_state_dict_is_what_hfs_file_holds(case: Case):
    state = get_peft_model_state_dict(case.adapted())
    heads = {f"base_model.{path}.{leaf}" for path in case.whole for leaf in ("weight", "bias")}
    factors = {"prefix_task_cols", "prefix_task_rows"} if case.method.prompt.in_decoder else set()
    assert set(state) == {"prompt_embeddings"} | heads | factors


def test_files_of_an_earlier_step(case: Case, tmp_path: Path):
    """With state_dict=, also where a network makes the virtual tokens of that step."""
    model = case.adapted()
    model.save_pretrained(tmp_path / "then")
    then = {p.name: Tensor(array(p)) for p in model.get_parameters()}
    shake(weights_of(model, "default"), seed=8)
    model.save_pretrained(tmp_path / "now", state_dict=then)
    for path in (tmp_path / "then").iterdir():
        if path.suffix == ".safetensors":
            assert (tmp_path / "now" / path.name).read_bytes() == path.read_bytes()
    for key, value in get_peft_model_state_dict(model, state_dict=then).items():
        assert differ(value, get_peft_model_state_dict(model)[key])
    with pytest.raises(LoadError, match="lacks tensors that the adapter has"):
        model.save_pretrained(tmp_path / "never", state_dict={})
    assert not (tmp_path / "never").exists()
