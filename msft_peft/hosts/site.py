"""Site: a place in a model that can be tuned."""

from dataclasses import dataclass, field
from typing import Any

from mindspore import Parameter, Tensor, nn, ops

LINEAR = "dense"
ATTENTION = "attention"


@dataclass(frozen=True)
class Site:
    """A place in a model that can be tuned.

    Attributes:
        path: dotted path below the model's root, as HF names it where the model's library does otherwise.
        kind: "dense", "embedding", "conv1d", "conv2d", "conv3d", "norm", "parameter" for one that no layer applies, or
            "attention" for a whole attention, whose weights are those of its layers.
        in_features, out_features: channels; for an embedding, the vocabulary and the dimension.
        shape: the weight's shape in torch's layout: (out, in), (vocabulary, dim), (out, in / groups, kernel...); a
            parameter's own.
        op: applies a weight of that layout as the layer applies its own, see `backend.ops`.
        layer: the Cell itself. A Site is no Cell, so nothing below it shows up twice in the tree; compiled code reads
            its parameters all the same.
        weight_name, bias_name: the attributes that hold the weight and the bias.
        transposed: the layer stores (in, out) (GPT-2's `Conv1D`).
        fan_in_fan_out: so does HF's layer at this place; None if that is as `transposed`.
        groups: of a convolution.
        channel_axis: the axis of the layer's outputs that its bias goes with.
        activation: what the layer (a `nn.Dense`) applies after its bias; a delta must go in before it.
        paired: the layer returns (output, bias) instead of the output.
    """

    path: str
    kind: str
    in_features: int
    out_features: int
    shape: tuple[int, ...]
    op: nn.Cell
    layer: nn.Cell = field(repr=False, compare=False)
    weight_name: str = "weight"
    bias_name: str = "bias"
    transposed: bool = False
    fan_in_fan_out: bool | None = None
    groups: int = 1
    channel_axis: int = -1
    activation: nn.Cell | None = None
    paired: bool = False

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def weight(self) -> Parameter:
        """The layer's own weight, as stored."""
        if self.kind == ATTENTION:  # it has none of its own: the first one of its layers
            return next(iter(self.layer.get_parameters()))
        # Past attribute access, which may give an adapted weight, see `core.parameter`.
        return self.layer._params[self.weight_name]

    @property
    def dtype(self) -> Any:
        """The weight's dtype."""
        return self.weight.dtype

    @property
    def bias(self) -> Parameter | None:
        """The layer's own bias, if it has one. Where it may be trained, compiled code must read `layer.bias`."""
        return getattr(self.layer, self.bias_name, None)

    def from_storage(self, w: Tensor) -> Tensor:
        """A weight as the layer stores it -> torch's layout."""
        return ops.transpose(w, (1, 0)) if self.transposed else ops.reshape(w, self.shape)

    def to_storage(self, w: Tensor, stored_shape: tuple[int, ...]) -> Tensor:
        """Torch's layout -> as the layer stores it."""
        return ops.transpose(w, (1, 0)) if self.transposed else ops.reshape(w, stored_shape)
