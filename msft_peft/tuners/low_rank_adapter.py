"""Low-rank adapters: bottleneck adapters whose two matrices are low-rank products."""

from dataclasses import dataclass

from mindspore import Tensor, ops

from msft_peft.delta.checks import DeltaTypeError, DeltaValueError, check_init
from msft_peft.errors import ConfigError
from msft_peft.hosts import Site
from msft_peft.registry import Method
from msft_peft.tuners.bottleneck_adapter import AdapterConfig, AdapterPatch, usual_places


@dataclass
class LowRankAdapterConfig(AdapterConfig):
    """Low-rank adapters: MindPet's `LowRankAdapterDense` under the HF API.

    Args:
        reduction_factor: the bottleneck is this many times smaller than the layer's output.
        low_rank_size: rank of the two products.
        low_rank_w_init: name of the initializer of their matrices.

    Beside these those of `AdapterConfig`.
    """

    peft_type: str | None = "LOW_RANK_ADAPTER"
    reduction_factor: int = 32
    low_rank_size: int = 1
    low_rank_w_init: str = "xavier_uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("reduction_factor", "low_rank_size")
        try:
            check_init(type(self).__name__, "low_rank_w_init", self.low_rank_w_init, (1, 1), (str,))
        except (DeltaTypeError, DeltaValueError) as error:
            raise ConfigError(str(error)) from error


class LowRankAdapterPatch(AdapterPatch):
    """y + f(y·Dₗ·Dᵣ + d)·Uₗ·Uᵣ + u, for the output y of a dense layer, with k = out // reduction_factor between.

    Weights:
        adapter_down_left.weight (out, rank), adapter_down_right.weight (rank, k), adapter_up_left.weight (k, rank): by
            `low_rank_w_init`.
        adapter_up_right.weight (rank, out): zeros.
        adapter_down.bias (k,), adapter_up.bias (out,): zeros.

    Source: Mahabadi et al. 2021, arXiv:2106.04647, §4.
    """

    def declare(self, site: Site, config: LowRankAdapterConfig) -> None:
        rank, out, drawn = config.low_rank_size, site.out_features, config.low_rank_w_init
        if config.reduction_factor > out:
            raise ConfigError(
                f"reduction_factor={config.reduction_factor} leaves nothing of {site.path}, whose output has {out} "
                "numbers: choose a smaller one."
            )
        inner = out // config.reduction_factor
        self.adapter_down_left = self.weight("adapter_down_left.weight", (out, rank), drawn)
        self.adapter_down_right = self.weight("adapter_down_right.weight", (rank, inner), drawn)
        self.adapter_down_bias = self.weight("adapter_down.bias", (inner,), "zeros")
        self.adapter_up_left = self.weight("adapter_up_left.weight", (inner, rank), drawn)
        last = "zeros" if config.init_weights else drawn
        self.adapter_up_right = self.weight("adapter_up_right.weight", (rank, out), last)
        self.adapter_up_bias = self.weight("adapter_up.bias", (out,), "zeros")

    # Two thin products each, in the place of MindPet's product of the matrices.
    def project_down(self, y: Tensor) -> Tensor:
        return self._product(y, self.adapter_down_left, self.adapter_down_right, self.adapter_down_bias)

    def project_up(self, h: Tensor) -> Tensor:
        return self._product(h, self.adapter_up_left, self.adapter_up_right, self.adapter_up_bias)

    def _product(self, x: Tensor, left: Tensor, right: Tensor, bias: Tensor) -> Tensor:
        h = self.op(x, ops.transpose(left, (1, 0)))
        return ops.add(self.op(h, ops.transpose(right, (1, 0))), bias)


METHOD = Method(
    config=LowRankAdapterConfig,
    patches={"dense": LowRankAdapterPatch},
    find_targets=usual_places,
    merges=False,
    mixed=True,
)
