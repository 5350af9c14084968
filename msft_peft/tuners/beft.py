"""BEFT: a few biases are trained, usually those of the value projections."""

import warnings
from dataclasses import dataclass

from mindspore import Tensor, ops
from mindspore.common.initializer import Normal

from msft_peft.config import TargetedConfig
from msft_peft.core.patch import Patch
from msft_peft.core.tuner import Tuner
from msft_peft.errors import MergeError, PeftWarning
from msft_peft.hosts import Site
from msft_peft.registry import Method
from msft_peft.tuners.architectures import USUAL


@dataclass
class BeftConfig(TargetedConfig):
    """Settings of BEFT.

    Args:
        init_weights: begin with zeros; False draws N(0, 1).
        target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save: see `TargetedConfig`. By
            default the architecture's value projections.

    Source: Huang et al. 2025, arXiv:2509.15974.
    Differs: GPT-2's `Conv1D`, `exclude_modules` and `layers_to_transform` work here.
    """

    beyond_hf = ("exclude_modules", "layers_to_transform", "layers_pattern")

    peft_type: str | None = "BEFT"
    init_weights: bool = True


class BeftPatch(Patch):
    """y = W·x + b + δ. A layer without a bias gains one, but cannot be merged.

    Weights:
        beft_bias (1, out): zeros.
    """

    def setup(self, site: Site, config: BeftConfig) -> None:
        if site.bias is None:
            warnings.warn(
                # No path in it, so that it is shown once and not for each layer.
                "Detected that the base layer has no bias term. Note you cannot merge the BEFT adapter into the base "
                "layer.",
                PeftWarning,
                stacklevel=2,
            )
        self.beft_bias = self.weight(
            "beft_bias", (1, site.out_features), "zeros" if config.init_weights else Normal(1.0)
        )

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return ops.add(y, ops.reshape(self.beft_bias, (-1,)))

    def check_mergeable(self) -> None:
        if self.site.bias is None:
            raise MergeError(f"Base layer has no bias, cannot merge bias adapter: it is {self.site.path}.")

    def merged(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        self.check_mergeable()
        return w, ops.add(b, ops.reshape(self.beft_bias, (-1,)))


class BeftModel(Tuner):
    """The base model with BEFT adapters in it, and the switches over them."""


# The last of the usual targets, where these have the queries first.
_VALUES = (
    "bart bert deberta-v2 gemma gemma2 gemma3_text gpt_neo gptj llama llama4 mistral mixtral mt5 opt qwen2 qwen3 "
    "roberta t5"
)

METHOD = Method(
    config=BeftConfig,
    tuner=BeftModel,
    patches={"dense": BeftPatch},
    default_targets={kind: list(USUAL[kind][-1:]) for kind in _VALUES.split()} | {"phi": ["v_proj"]},
    mixed=True,
)
