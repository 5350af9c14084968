"""Bottleneck adapters: a small network with a residual connection after chosen layers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mindspore import Tensor, nn, ops
from mindspore.common.initializer import Normal

from msft_peft.config import TargetedConfig
from msft_peft.core.patch import Patch
from msft_peft.delta.activation import non_linearity
from msft_peft.delta.checks import DeltaTypeError, DeltaValueError
from msft_peft.errors import ConfigError, MergeError
from msft_peft.hosts import Site, model_config
from msft_peft.registry import Method

HOULSBY, PFEIFFER = "houlsby", "pfeiffer"
# The layers that end a block's attention, and its feed-forward part.
_BERT = (r"attention\.output\.dense", r"layer\.\d+\.output\.dense")
_OUTPUTS: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "deberta", "deberta-v2", "vit"), _BERT),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "glm", "phi3"), ("o_proj", "down_proj")),
    "gpt2": (r"attn\.c_proj", r"mlp\.c_proj"),
    "opt": ("out_proj", "fc2"),
    "bloom": (r"self_attention\.dense", "dense_4h_to_h"),
    "gpt_neox": (r"attention\.dense", "dense_4h_to_h"),
    **dict.fromkeys(("t5", "mt5"), (r"SelfAttention\.o", "wo")),
}


@dataclass
class AdapterConfig(TargetedConfig):
    """What both kinds of adapters have.

    Args:
        placement: where adapters go if `target_modules` names no layers: "houlsby" after each block's attention and
            feed-forward part (Houlsby et al. 2019), "pfeiffer" after the latter alone (Pfeiffer et al. 2021).
        non_linearity: between the projections; a name that `mindspore.nn.get_activation` knows.
        adapter_dropout: probability of dropping the numbers that the adapter is given, while training.
        init_weights: True begins with a last projection of zeros, so that a fresh adapter is the identity; False as
            MindPet does, near it.
        bias: "all" trains every bias of the base model beside the adapters (BitFit), "none" none. Only one adapter of
            a model can.

    Raises:
        ConfigError: a value that makes no sense.
    """

    placement: str = HOULSBY
    non_linearity: str = "gelu"
    adapter_dropout: float = 0.0
    init_weights: bool = True
    bias: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.placement not in (HOULSBY, PFEIFFER):
            raise ConfigError(f"placement must be {HOULSBY!r} or {PFEIFFER!r}, got {self.placement!r}")
        if self.bias not in ("none", "all"):
            raise ConfigError(f"bias must be 'none' or 'all', got {self.bias!r}")
        if not isinstance(self.adapter_dropout, int | float) or not 0 <= self.adapter_dropout < 1:
            raise ConfigError(f"adapter_dropout must lie in [0, 1), got {self.adapter_dropout!r}")
        try:
            non_linearity(type(self).__name__, self.non_linearity)
        except (DeltaTypeError, DeltaValueError) as error:
            raise ConfigError(str(error)) from error

    def check_positive(self, *names: str) -> None:
        """Raise ConfigError unless each of these fields is an int above zero."""
        for name in names:
            value = getattr(self, name)
            if type(value) is not int or value <= 0:
                raise ConfigError(f"{name} must be a positive int, got {value!r}")


@dataclass
class BottleneckAdapterConfig(AdapterConfig):
    """Bottleneck adapters: MindPet's `AdapterDense` under the HF API.

    Args:
        bottleneck_size: between the projections.

    Beside these those of `AdapterConfig`.
    """

    peft_type: str | None = "BOTTLENECK_ADAPTER"
    bottleneck_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("bottleneck_size")


class AdapterPatch(Patch):
    """y + U(f(D(dropout(y)))) for a layer's output y: what all adapters share. They cannot be merged.

    Raises:
        ConfigError: the layer applies an activation of its own, after which the adapter would have to come.
    """

    def setup(self, site: Site, config: Any) -> None:
        if site.activation is not None:
            raise ConfigError(
                f"{site.path} applies {type(site.activation).__name__} within the layer, and an adapter comes after "
                "that. Target the layer behind it, or apply the activation outside."
            )
        self.non_linearity = non_linearity(type(config).__name__, config.non_linearity)
        self.dropout = nn.Dropout(p=float(config.adapter_dropout)) if config.adapter_dropout else nn.Identity()
        self.declare(site, config)

    def declare(self, site: Site, config: Any) -> None:
        """Declare the weights."""
        raise NotImplementedError

    def project_down(self, y: Tensor) -> Tensor:
        raise NotImplementedError

    def project_up(self, h: Tensor) -> Tensor:
        raise NotImplementedError

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.non_linearity(self.project_down(self.dropout(self.cast(y))))
        return ops.add(y, self.project_up(h))

    def merged(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        raise MergeError(f"The adapter at {self.site.path} is not linear: no weight is equal to it.")


class BottleneckPatch(AdapterPatch):
    """y + f(y·Dᵀ + d)·Uᵀ + u, for the output y of a dense layer.

    Weights:
        adapter_down.weight (bottleneck, out), adapter_down.bias (bottleneck,): normal with σ = 0.01, and zeros.
        adapter_up.weight (out, bottleneck), adapter_up.bias (out,): zeros.

    Source: Houlsby et al. 2019, arXiv:1902.00751, §2.1; Pfeiffer et al. 2021, arXiv:2005.00247.
    """

    def declare(self, site: Site, config: BottleneckAdapterConfig) -> None:
        size, small = config.bottleneck_size, Normal(0.01)
        self.adapter_down = self.weight("adapter_down.weight", (size, site.out_features), small)
        self.adapter_down_bias = self.weight("adapter_down.bias", (size,), "zeros")
        up = "zeros" if config.init_weights else small
        self.adapter_up = self.weight("adapter_up.weight", (site.out_features, size), up)
        self.adapter_up_bias = self.weight("adapter_up.bias", (site.out_features,), "zeros")

    def project_down(self, y: Tensor) -> Tensor:
        return ops.add(self.op(y, self.adapter_down), self.adapter_down_bias)

    def project_up(self, h: Tensor) -> Tensor:
        return ops.add(self.op(h, self.adapter_up), self.adapter_up_bias)


def usual_places(config: AdapterConfig, model: nn.Cell, sites: Mapping[str, Site]) -> str | None:
    """A regex for the layers after which adapters go in models of this kind; None where that is not known."""
    attention, feed_forward = _OUTPUTS.get(str(model_config(model).get("model_type")), ("", ""))
    if not feed_forward:
        return None
    places = [feed_forward] if config.placement == PFEIFFER else [attention, feed_forward]
    return rf"(.*\.)?({'|'.join(places)})"


METHOD = Method(
    config=BottleneckAdapterConfig,
    patches={"dense": BottleneckPatch},
    find_targets=usual_places,
    merges=False,
    mixed=True,
)
