"""TunerLayers for what is no plain function of one tensor, and which one can stand in the place of a layer."""

from typing import Any

from mindspore import Tensor, nn, ops

from msft_peft.core.layer import TunerLayer
from msft_peft.core.routing import Routing
from msft_peft.hosts import Site


class PairedTunerLayer(TunerLayer):
    """A TunerLayer for a layer that returns (output, bias): None, or a bias that whoever calls it is to add.

    With adapters in effect it adds that bias itself and returns zeros in its place, since they may change the bias.
    """

    def __init__(self, base: nn.Cell, site: Site, routing: Routing) -> None:
        super().__init__(base, site, routing)
        self.leaves_bias = site.bias is not None and base.skip_bias_add

    def construct(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        y = self.adapted(x)
        if not self.leaves_bias:
            return y, None
        bias = self.base_layer.bias
        return y, ops.zeros_like(bias) if self.adapting or self.routing.names else bias

    def _base_output(self, x: Tensor) -> Tensor:
        return self.base_layer(x)[0]

    def _linear(self, x: Tensor) -> Tensor:
        y = super()._linear(x)
        return ops.add(y, ops.cast(self.base_layer.bias, y.dtype)) if self.leaves_bias else y


class AttentionLayer(TunerLayer):
    """A TunerLayer for a whole attention: Patches there say what its queries look at beside the text.

    The attention makes keys and values of a Patch's `tokens`, and takes them with its `gate`, see `attend_beside` in
    `models.attention`. What several adapters do adds up.
    """

    def construct(self, *args: Any, **kwargs: Any) -> Any:
        if self.routing.names:
            return self._divided(args, kwargs)
        if not self.adapting:
            return self.base_layer(*args, **kwargs)
        return self.base_layer(*args, **kwargs, beside=self._beside(self.active))

    def _beside(self, names: tuple[str, ...]) -> tuple[tuple[Tensor, Tensor, Tensor], ...]:
        found: tuple[Any, ...] = ()
        for name in names:
            patch = self.adapters[name]
            k, v = self.base_layer.keys_and_values(ops.cast(patch.tokens(), self.site.dtype))
            found = (*found, (k, v, patch.gate()))
        return found

    def _divided(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Each row with what its own adapter puts beside: a pass for each, of whose results only the first differs."""
        outputs = self.base_layer(*args, **kwargs)
        for name in self.apart:
            mine = self.base_layer(*args, **kwargs, beside=self._beside((name,)))
            if isinstance(outputs, tuple):
                outputs = (ops.where(self.routing.serves(name, outputs[0]), mine[0], outputs[0]), *outputs[1:])
            else:
                outputs = ops.where(self.routing.serves(name, outputs), mine, outputs)
        return outputs


def tuner_layer(base: nn.Cell, site: Site, routing: Routing) -> TunerLayer:
    """The TunerLayer that can stand in the place of `base`."""
    if site.kind == "attention":
        return AttentionLayer(base, site, routing)
    return (PairedTunerLayer if site.paired else TunerLayer)(base, site, routing)
