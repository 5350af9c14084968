"""`TrainableParamsCheckPoint` under MindSpore's own `Model`."""

import os
from collections.abc import Iterator
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn
from mindspore.dataset import GeneratorDataset
from mindspore.train import CheckpointConfig, Model

from msft_peft import LoraConfig, delta, get_peft_model
from msft_peft.graph import TrainableParamsCheckPoint, freeze_delta
from msft_peft.graph.exceptions import AbsolutePathError, LinkPathError
from tests import nets
from tests.graph.nets import Mixed
from tests.tolerances import array, assert_same


def train(net: nn.Cell, callback: TrainableParamsCheckPoint, inputs: int = 6, outputs: int = 3) -> None:
    rng = np.random.default_rng(0)

    def rows() -> Iterator:
        for _ in range(4):
            yield rng.standard_normal(inputs).astype("float32"), rng.standard_normal(outputs).astype("float32")

    data = GeneratorDataset(list(rows()), ["x", "y"], shuffle=False).batch(2)
    model = Model(net, loss_fn=nn.MSELoss(), optimizer=nn.Adam(net.trainable_params(), 0.01))
    model.train(2, data, callbacks=[callback], dataset_sink_mode=False)


def test_files_hold_what_is_trained_and_nothing_else(tmp_path: Path, mode: str):
    net = Mixed(delta)
    freeze_delta(net, "lora", exclude=["head*"])
    before = {p.name: array(p) for p in net.get_parameters()}
    callback = TrainableParamsCheckPoint(str(tmp_path / "new" / "folder"), config=CheckpointConfig(2, 0, 5))
    train(net, callback)
    files = sorted(path.name for path in (tmp_path / "new" / "folder").glob("*.ckpt"))
    assert files == ["DELTA_CKP-1_2.ckpt", "DELTA_CKP-2_2.ckpt"]
    assert callback.latest_ckpt_file_name.endswith(files[-1])
    saved = ms.load_checkpoint(callback.latest_ckpt_file_name)
    after = {p.name: p for p in net.trainable_params()}
    assert set(saved) == set(after) == {f"lora.mindpet_delta_lora_{x}" for x in "ab"} | {"head.weight", "head.bias"}
    for name, p in after.items():
        assert_same(saved[name], p, "exact")
        assert not np.array_equal(array(p), before[name])
    fresh = Mixed(delta)
    missing, unexpected = ms.load_param_into_net(fresh, saved)
    assert not unexpected
    assert set(missing) == {p.name for p in fresh.get_parameters()} - set(saved)
    assert_same(fresh.head.weight, net.head.weight, "exact")


def test_a_peft_model_is_saved_so_too(tmp_path: Path):
    model = get_peft_model(nets.Dense(), LoraConfig(target_modules=["lin0"], r=2))
    callback = TrainableParamsCheckPoint(str(tmp_path), "LORA", CheckpointConfig(format="safetensors"))
    train(model, callback, outputs=5)
    assert set(ms.load_checkpoint(callback.latest_ckpt_file_name, format="safetensors")) == {
        f"base_model.model.lin0.lora_{x}.default.weight" for x in "AB"
    }


def test_the_config_is_kept_and_its_network_is_obeyed(tmp_path: Path):
    net = Mixed(delta)
    freeze_delta(net, "lora", exclude=["head*"])
    config = CheckpointConfig(1, 0, keep_checkpoint_max=2, saved_network=net.head, append_info=[{"lr": 0.5}])
    callback = TrainableParamsCheckPoint(str(tmp_path), config=config)
    train(net, callback)
    assert config.saved_network is net.head  # the caller's own object is left alone
    assert len(list(tmp_path.glob("*.ckpt"))) == 2
    saved = ms.load_checkpoint(callback.latest_ckpt_file_name)
    assert set(saved) == {"head.weight", "head.bias", "lr"}


def test_a_network_without_trainable_parameters_is_refused(tmp_path: Path):
    net = Mixed(delta)
    freeze_delta(net, "lora")
    for p in net.head.get_parameters():
        p.requires_grad = False
    callback = TrainableParamsCheckPoint(str(tmp_path), config=CheckpointConfig(saved_network=net.head))
    with pytest.raises(ValueError, match="Dense has no trainable parameters"):
        train(net, callback)


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ({"directory": None}, ValueError),
        ({"directory": ""}, ValueError),
        ({"directory": 3}, TypeError),
        ({"directory": "relative/folder"}, AbsolutePathError),
        ({"prefix": "a/b"}, ValueError),
        ({"prefix": 3}, ValueError),
        ({"config": 3}, TypeError),
    ],
)
def test_refusals(tmp_path: Path, arguments: dict, kind: type):
    with pytest.raises(kind):
        TrainableParamsCheckPoint(**{"directory": str(tmp_path)} | arguments)


@pytest.mark.parametrize("end", ["", "/"])
def test_a_link_is_refused(tmp_path: Path, end: str):
    (tmp_path / "real").mkdir()
    os.symlink(tmp_path / "real", tmp_path / "link")
    with pytest.raises(LinkPathError, match="is a link"):
        TrainableParamsCheckPoint(str(tmp_path / "link") + end)
