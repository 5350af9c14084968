"""Adapters on a parameter that no layer applies: the module that holds it reads the adapted value instead."""

from typing import Any

from mindspore import Tensor, nn, ops

from msft_peft.core.layer import TunerLayer
from msft_peft.core.routing import Routing
from msft_peft.hosts import Site, original


class ParameterLayer(TunerLayer):
    """A module with Patches on one of its parameters: W' = W + the deltas of the active adapters.

    The module itself is not changed. Its class is replaced by a subclass whose attribute of the parameter's name is a
    property, which compiled code inlines; the parameter stays where it was.
    """

    def __init__(self, base: nn.Cell, site: Site, routing: Routing) -> None:
        super().__init__(base, site, routing)
        reader = original(site.layer)
        _serve(reader, {**_slots_of(reader), site.weight_name: _Slot(self)})
        self.built = True

    def construct(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_layer(*args, **kwargs)

    def value(self) -> Tensor:
        """What the module reads."""
        # Not `site.weight`: a property of an object that is no Cell is a constant to compiled code.
        w = self.site.layer._params[self.site.weight_name]
        if not self.adapting:
            return w
        for name in self.active:
            delta = self.adapters[name].delta_weight()
            w = ops.add(w, delta if delta.dtype == w.dtype else ops.cast(delta, w.dtype))
        return w

    def released(self) -> None:
        reader = original(self.site.layer)
        slots = _slots_of(reader)
        _serve(reader, {name: slot for name, slot in slots.items() if slot.layer is not self})

    def __getattr__(self, name: str) -> Any:
        """Anything else is asked of the module, for code that reads its attributes."""
        try:
            return nn.Cell.__getattr__(self, name)
        except AttributeError:
            if "built" not in self.__dict__:
                raise
            module = self.site.layer
            return getattr(module, name) if hasattr(module, name) else super().__getattr__(name)


class _Slot:
    """Whom a module asks for a parameter; a plain object, so that the wrapper is no child of what it wraps."""

    def __init__(self, layer: ParameterLayer) -> None:
        self.layer = layer


def _slots_of(module: Any) -> dict[str, _Slot]:
    return getattr(module, "peft_slots", {})


def _serve(module: Any, slots: dict[str, _Slot]) -> None:
    """Let a module read the parameters of these names through their wrappers, and all others as they are."""
    plain = getattr(module, "peft_plain_class", type(module))
    if not slots:
        module.__class__ = plain
        del module.peft_slots, module.peft_plain_class
        return
    module.peft_slots, module.peft_plain_class = slots, plain
    # All in one class: graph mode takes a property that is inherited for a constant, with no gradient.
    own = {name: _reader(name) for name in slots}
    module.__class__ = type(plain.__name__, (plain,), {**own, "__module__": plain.__module__})


def _reader(name: str) -> property:
    def read(self: Any) -> Tensor:
        return self.peft_slots[name].layer.value()

    return property(read)


def owner_of(path: str) -> str:
    """The module that holds the parameter for which there is a wrapper at this path, maybe inside others."""
    return path.split(".base_layer")[0]
