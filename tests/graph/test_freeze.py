"""What is trained after each of MindPet's freezing calls."""

import os
from fnmatch import fnmatchcase
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

from msft_peft import PeftError, delta
from msft_peft.errors import PeftWarning
from msft_peft.graph import freeze_delta, freeze_from_config, freeze_modules
from msft_peft.graph.exceptions import ModelConfigFreezeInfoError, ReadYamlFileError, UnexpectedError
from tests.graph.nets import Mixed, trained
from tests.tolerances import array


@pytest.fixture
def net() -> Mixed:
    return Mixed(delta)


FIXED = {"prefix.input_tokens", "encoder.mindpet_delta_ptuning2_prefix", "norm.moving_mean", "norm.moving_variance"}


def matching(net: nn.Cell, *patterns: str) -> set[str]:
    paths = {path for path, _ in net.parameters_and_names()} - FIXED
    return {path for path in paths if any(fnmatchcase(path, pattern) for pattern in patterns)}


@pytest.mark.parametrize(
    ("mode", "where"),
    [
        ("lora", "lora.mindpet_*"),
        ("adapter", "adapter.mindpet_*"),
        ("low_rank_adapter", "low.mindpet_*"),
        ("prefixtuning", "prefix.*"),
        ("ptuning2", "encoder.*"),
        ("bitfit", "*bias"),
        ("LoRA", "lora.mindpet_*"),
    ],
)
def test_freeze_delta_leaves_the_algorithms_own_parameters(net: Mixed, mode: str, where: str):
    freeze_delta(net, mode)
    assert trained(net) == matching(net, where) != set()


def test_include_and_exclude_come_after_the_mode(net: Mixed):
    freeze_delta(net, "lora", include=["*lora_a"], exclude=["head*"])
    assert trained(net) == matching(net, "*lora_b", "head*")
    freeze_delta(net, "adapter", exclude=["*bias"])  # BitFit beside another algorithm
    assert trained(net) == matching(net, "adapter.mindpet_*", "*bias")
    freeze_delta(net, "lora", include=["*lora*"], exclude=["*lora*"])
    assert trained(net) == matching(net, "lora.mindpet*")
    freeze_delta(net, "lora")  # what an earlier call froze is trained again
    assert trained(net) == matching(net, "lora.mindpet*")


@pytest.mark.parametrize(
    ("include", "exclude", "left"),
    [
        (["*"], None, ()),
        (["*"], ["head*"], ("head*",)),  # a conflict: left as they were, trainable
        (["lora*", "head.weight"], None, ("adapter*", "low*", "prefix*", "encoder*", "norm*", "head.bias")),
        (["adapter.*.bias", "[!a]*"], None, ("adapter.weight", "adapter.bias", "adapter.*sampler.weight")),
        (["head*"], ["*"], ("*",)),
    ],
)
def test_freeze_modules(net: Mixed, include: list, exclude: list | None, left: tuple):
    freeze_modules(net, include, exclude)
    assert trained(net) == matching(net, *left)


def test_a_conflict_leaves_what_is_frozen_frozen_and_exclude_unfreezes(net: Mixed):
    freeze_modules(net, ["*"])
    freeze_modules(net, ["head*"], ["*"])
    assert trained(net) == matching(net, "*") - matching(net, "head*")
    freeze_modules(net, exclude=["*"])
    assert trained(net) == matching(net, "*")  # positions and running averages are nothing to train


def test_a_compiled_step_sees_it(net: Mixed, mode: str):
    x, before = net.sample(), {path: array(p) for path, p in net.parameters_and_names()}

    @ms.jit
    def step(x: ms.Tensor) -> ms.Tensor:
        return grad(x)

    for chosen in ("lora", "adapter"):
        freeze_delta(net, chosen)
        weights = net.trainable_params()
        grad = ms.grad(net, None, weights)
        assert len(step(x)) == len(weights)
    assert all(np.array_equal(array(p), before[path]) for path, p in net.parameters_and_names())


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda net: freeze_modules(net), ValueError, "cannot both be None"),
        (lambda net: freeze_modules(3, ["*"]), TypeError, "must be a Cell"),
        (lambda net: freeze_modules(net, "head"), TypeError, "`include` must be a list"),
        (lambda net: freeze_modules(net, []), TypeError, "`include` must be a list"),
        (lambda net: freeze_modules(net, ["*"], [3]), TypeError, "`exclude` must be a list"),
        (lambda net: freeze_delta(net, "r_drop"), ValueError, "R-Drop is a loss"),
        (lambda net: freeze_delta(net, "prefix"), ValueError, "must be one of"),
        (lambda net: freeze_delta(net, 3), ValueError, "must be one of"),
        (lambda net: freeze_delta(3, "lora"), TypeError, "must be a Cell"),
        (lambda net: freeze_delta(net, "lora", include="a"), TypeError, "`include` must be a list"),
        (lambda net: freeze_delta(net, "lora", include="a"), UnexpectedError, "`include` must be a list"),
        (lambda net: freeze_delta(net, "lora", exclude=[3]), TypeError, "`exclude` must be a list"),
        (lambda net: freeze_from_config(net, 3), TypeError, "must be a string"),
        (lambda net: freeze_from_config(3, "x"), TypeError, "must be a Cell"),
        (lambda net: freeze_from_config(net, "/nowhere.yaml"), ReadYamlFileError, "is no file"),
        (lambda net: freeze_from_config(net, "/"), ReadYamlFileError, "is no file"),
    ],
)
def test_refusals_leave_the_network_as_it_was(net: Mixed, call, kind: type, text: str):
    before = trained(net)
    with pytest.raises(kind, match=text) as caught:
        call(net)
    assert isinstance(caught.value, PeftError)
    assert trained(net) == before


def test_what_matches_nothing_is_said(net: Mixed):
    with pytest.warns(PeftWarning, match="'haed' matches no parameter"):
        freeze_modules(net, ["haed"])
    with pytest.warns(PeftWarning, match="Dense has none. Put the delta Cells in first"):
        freeze_delta(nn.Dense(2, 2), "lora")


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("freeze:\n  include: ['*']\n  exclude: ['*lora*']\n", ("lora*",)),
        ("freeze:\n  include: ['*']\n", ()),
        ("seed: 1\nfreeze:\n  exclude: ['head*']\n", ("*",)),
    ],
)
def test_freeze_from_config(net: Mixed, tmp_path: Path, text: str, left: tuple):
    (tmp_path / "config.yaml").write_text(text)
    freeze_from_config(net, str(tmp_path / "config.yaml"))
    assert trained(net) == matching(net, *left)


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ("", ModelConfigFreezeInfoError, "'freeze' is missing"),
        ("a: 1", ModelConfigFreezeInfoError, "'freeze' is missing"),
        ("[1]", ModelConfigFreezeInfoError, "'freeze' is missing"),
        ("freeze:", ModelConfigFreezeInfoError, "must hold"),
        ("freeze: 3", ModelConfigFreezeInfoError, "must hold"),
        ("freeze:\n  mode: lora", ModelConfigFreezeInfoError, r"keys \['mode'\]"),
        ("freeze:\n  include: x", TypeError, "`include` must be a list"),
        ("a: [", ReadYamlFileError, "no valid YAML"),
        ("a: [", UnexpectedError, "no valid YAML"),
        ("!!python/object/apply:os.system ['true']", ReadYamlFileError, "no valid YAML"),
    ],
)
def test_freeze_from_config_refuses(net: Mixed, tmp_path: Path, text: str, kind: type, words: str):
    before = trained(net)
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(kind, match=words):
        freeze_from_config(net, str(tmp_path / "config.yaml"))
    assert trained(net) == before


def test_freeze_from_config_follows_no_link(net: Mixed, tmp_path: Path):
    (tmp_path / "config.yaml").write_text("freeze:\n  include: ['*']\n")
    os.symlink(tmp_path / "config.yaml", tmp_path / "link.yaml")
    with pytest.raises(ReadYamlFileError, match="is a link"):
        freeze_from_config(net, str(tmp_path / "link.yaml"))
