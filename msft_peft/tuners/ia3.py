"""(IA)³: one learned factor for each output channel, or in feed-forward layers for each input channel."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from mindspore import Tensor, ops
from mindspore.common.initializer import Normal

from msft_peft.backend.arrays import as_float32, to_numpy, write
from msft_peft.config import TargetedConfig, check_regex
from msft_peft.core.patch import Patch
from msft_peft.core.targets import is_named
from msft_peft.core.tuner import Tuner
from msft_peft.core.weighted import parts_of, put_beside, union_of, whole_modules
from msft_peft.errors import ConfigError
from msft_peft.hosts import Site
from msft_peft.registry import Method
from msft_peft.tuners.architectures import IA3, IA3_FEEDFORWARD
from msft_peft.tuners.lora.exact import prepare_exactly


@dataclass
class IA3Config(TargetedConfig):
    """Settings of (IA)³.

    Args:
        feedforward_modules: which of the targets are scaled at their inputs, as a list of names or a regex; None for
            the architecture's usual ones, [] for none.
        fan_in_fan_out: the target layers store (in, out), as GPT-2's `Conv1D`; corrected with a warning if wrong.
        init_ia3_weights: begin with ones, so that a fresh adapter is the identity; False draws N(0, 1).
        target_modules, exclude_modules, modules_to_save: see `TargetedConfig`.

    Raises:
        ConfigError: feed-forward layers that are no targets.

    Source: Liu et al. 2022, arXiv:2205.05638, §3.3.
    Differs: HF takes the name of a feed-forward layer for the end of any path, "up" for `group` too; here, as in
        `target_modules`, it is whole parts of a path. `layers_to_transform` works here.
    """

    beyond_hf = ("layers_to_transform", "layers_pattern")

    peft_type: str | None = "IA3"
    feedforward_modules: list[str] | str | None = None
    fan_in_fan_out: bool = False
    init_ia3_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.feedforward_modules, str):
            check_regex("feedforward_modules", self.feedforward_modules)
        elif self.feedforward_modules is not None:
            self.feedforward_modules = sorted(set(self.feedforward_modules))
            if isinstance(self.target_modules, list) and not {*self.feedforward_modules} <= {*self.target_modules}:
                raise ConfigError("`feedforward_modules` should be a subset of `target_modules`")


class IA3Patch(Patch):
    """y = l ∘ (W·x + b), or in a feed-forward layer y = W·(l ∘ x) + b.

    Weights:
        ia3_l: (out, 1), in a feed-forward layer (1, in); for a convolution (1, channels, 1...). Ones.
    """

    def setup(self, site: Site, config: IA3Config) -> None:
        self.feedforward = is_named(config.feedforward_modules or [], site.path)
        features = site.in_features if self.feedforward else site.out_features
        rest = (1,) * (len(site.shape) - 2)
        row = self.feedforward or site.kind != "dense"
        shape = (1, features, *rest) if row else (features, 1)
        self.ia3_l = self.weight("ia3_l", shape, "ones" if config.init_ia3_weights else Normal(1.0))
        self.along_channels = (-1, *rest)

    def before(self, x: Tensor) -> Tensor:
        return self.scaled(x) if self.feedforward else x

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return y if self.feedforward else self.scaled(y)

    def scaled(self, x: Tensor) -> Tensor:
        """x with each channel times its factor."""
        return ops.cast(ops.mul(self.cast(x), ops.reshape(self.ia3_l, self.along_channels)), x.dtype)

    def merged(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        out, inputs, *kernel = w.shape
        if not self.feedforward:
            factor = ops.reshape(self.ia3_l, (-1,))
            w = ops.mul(w, ops.reshape(factor, (-1,) + (1,) * (len(w.shape) - 1)))
            return w, b if b is None else ops.mul(b, factor)
        # The outputs of a group read only its own inputs.
        groups = self.site.groups
        factor = ops.reshape(self.ia3_l, (groups, 1, inputs) + (1,) * len(kernel))
        return ops.reshape(ops.mul(ops.reshape(w, (groups, out // groups, inputs, *kernel)), factor), w.shape), b


class IA3Model(Tuner):
    """The base model with (IA)³ adapters in it; what `PeftModel.base_model` is for (IA)³."""

    def add_weighted_adapter(self, adapters: list[str], weights: list[float], adapter_name: str) -> None:
        """Add an adapter whose factors are l = Σ wᵢ·lᵢ; inactive and frozen, the others untouched.

        Args:
            adapters: names of the adapters to combine.
            weights: one number for each; may be negative. They should add up to one.
            adapter_name: the new adapter's name.

        Raises:
            AdapterNameError: the new name is taken or cannot be one, or an adapter is not there.
            ConfigError: a list and a regex among the targets, two adapters that train the same layer whole, or that
                scale one at its input and the other at its output.

        In each case nothing has changed.

        Differs: HF does nothing when the name is taken, and takes factors of zero for a layer that an adapter does not
            adapt; here they are ones, as they act. It fails half-way where one adapter scales inputs and the other
            outputs.
        """
        parts = parts_of(self.model, adapters, weights, adapter_name)
        modules = whole_modules(parts)
        shapes: dict[str, dict[tuple[int, ...], str]] = {}
        for part in parts:
            for path, patch in part.patches.items():
                shapes.setdefault(path, {})[tuple(patch.ia3_l.shape)] = part.name
        mixed = {path: sorted(names.values()) for path, names in shapes.items() if len(names) > 1}
        if mixed:
            raise ConfigError(f"Adapters that scale inputs and outputs of one layer cannot be combined: {mixed}.")
        heads = dict.fromkeys(head for part in parts for head in part.config.modules_to_save or [])  # type: ignore[attr-defined]
        first = parts[0].config
        assert isinstance(first, IA3Config)
        config = replace(
            copy.deepcopy(first),
            target_modules=union_of(parts, "target_modules"),
            feedforward_modules=union_of(parts, "feedforward_modules"),
            modules_to_save=list(heads) or None,
        )
        made = prepare_exactly(self.model, config, adapter_name, set(shapes))
        for path, patch in made.patches.items():
            total = np.zeros(patch.ia3_l.shape, np.float32)
            for part, weight in zip(parts, weights, strict=True):
                held = part.patches.get(path)
                total += np.float32(weight) * (1.0 if held is None else as_float32(to_numpy(held.ia3_l)))
            write(patch.ia3_l, total)
        put_beside(self, made, modules)


def _settle(config: IA3Config, model: Mapping[str, Any]) -> None:
    if config.feedforward_modules is None:
        if model.get("model_type") not in IA3_FEEDFORWARD:
            raise ConfigError(
                "Please specify `feedforward_modules` in `peft_config`: [] if none of the target layers is one."
            )
        config.feedforward_modules = list(IA3_FEEDFORWARD[str(model["model_type"])])


METHOD = Method(
    config=IA3Config,
    patches=dict.fromkeys(("dense", "conv2d", "conv3d"), IA3Patch),
    default_targets=IA3,
    settle=_settle,
    mixed=True,
    tuner=IA3Model,
)
