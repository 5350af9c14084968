"""mindnlp: transformers' own models on mindtorch, whose Modules are no Cells. A tree of Cells mirrors theirs.

The mirror is what adapters are put into; `settle` brings the Modules in line with it. Nothing of the library is
imported here before a user has made one of its models.
"""

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from msft_peft.backend.ops import ConvOp, DenseOp, EmbeddingOp
from msft_peft.hosts import cells, trainer
from msft_peft.hosts.host import Host
from msft_peft.hosts.site import LINEAR, Site

_LIBRARY = "mindtorch"
_STATES = "past_key_values"
_NORMS = {"LayerNorm": -1, "GroupNorm": 1, "BatchNorm1d": 1, "BatchNorm2d": 1, "BatchNorm3d": 1}


class ModuleCell(nn.Cell):
    """A Module as a Cell: its children and parameters under the names that they have there, its `forward` to call.

    Its parameters become `mindspore.Parameter`s over the same memory, since MindSpore's optimizers take no others.

    Attributes:
        module: the Module. What is not found here is asked of it.
    """

    def __init__(self, module: Any, known: dict[int, Any] | None = None) -> None:
        super().__init__(auto_prefix=False)
        self.__dict__["module"] = module
        self.__dict__["shims"] = {}
        self.mirror(known)

    def mirror(self, known: dict[int, Any] | None = None) -> None:
        """Take the Module's parameters and children as they are now; what is shared there is shared here."""
        known = {} if known is None else known
        known[id(self.module)] = self
        before = dict(self._cells)
        self._params.clear()
        self._cells.clear()
        for name, p in self.module._parameters.items():
            if p is not None:
                mine = known.setdefault(id(p), _as_parameter(p))
                self._params[name] = self.module._parameters[name] = known[id(mine)] = mine
        for name, child in self.module._modules.items():
            if isinstance(child, _shim_class()):
                self._cells[name] = child.cell
            elif child is not None:
                self._cells[name] = known.get(id(child)) or _mirrored(child, before.get(name), known)
        super().add_flags(training=self.module.training)

    def settle(self) -> None:
        """Let the Module have the parameters and children that stand here: Modules, or what calls a Cell."""
        self.module._parameters.update(self._params)
        for name, cell in self._cells.items():
            if isinstance(cell, ModuleCell):
                self.module._modules[name] = cell.module
                self.shims.pop(name, None)
            elif getattr(self.shims.get(name), "cell", None) is not cell:
                self.shims[name] = self.module._modules[name] = _shim_class()(cell)

    def construct(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(kwargs.get(_STATES), tuple):
            kwargs[_STATES] = _as_cache(kwargs[_STATES], self.module)
        return self.module(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The Module's `generate`; what stands before the input comes as embeddings, or as keys and values."""
        ids = kwargs.get("input_ids")
        if ids is not None and not self.module.config.is_encoder_decoder:
            if isinstance(kwargs.get(_STATES), tuple):
                return self._generate_after_prefix(ids, kwargs)
            if kwargs.get("inputs_embeds") is not None:
                # It would take both for the same tokens. Given embeddings alone, it returns what is new.
                made = self.module.generate(**{key: value for key, value in kwargs.items() if key != "input_ids"})
                return _with_sequences(made, lambda new: ops.concat((_repeated(ids, new), new), 1))
        return self.module.generate(*args, **kwargs)

    def _generate_after_prefix(self, ids: Tensor, kwargs: dict[str, Any]) -> Any:
        n = kwargs[_STATES][0][0].shape[2]
        # It takes the first n tokens for those whose keys and values are there already: let them be any.
        front = ops.zeros((ids.shape[0], n), ids.dtype)
        mask = kwargs.get("attention_mask")
        mask = ops.ones_like(ids) if mask is None else mask
        given = {
            _STATES: _as_cache(kwargs[_STATES], self.module),
            "input_ids": ops.concat((front, ids), 1),
            "attention_mask": ops.concat((ops.ones((ids.shape[0], n), mask.dtype), mask), 1),
        }
        if kwargs.get("max_length") is not None:
            given["max_length"] = kwargs["max_length"] + n
        return _with_sequences(self.module.generate(**kwargs | given), lambda tokens: tokens[:, n:])

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        ends = (self.module.get_input_embeddings(), self.module.get_output_embeddings())
        new: dict[int, Any] = {}  # the two may share one
        for layer in ends:
            p = None if layer is None else layer._parameters.get("weight")
            if isinstance(p, Parameter):  # of which the library cannot replace the data
                own = importlib.import_module("mindtorch").nn.Parameter
                layer._parameters["weight"] = new.setdefault(id(p), own(Tensor(p), requires_grad=p.requires_grad))
        table = self.module.resize_token_embeddings(*args, **kwargs)
        self.mirror()
        return table

    def extend_repr(self) -> str:
        return self.module.extra_repr()

    def cell_of(self, module: Any) -> nn.Cell | None:
        """The Cell below this one that stands for a Module, or that a shim calls."""
        below = (cell for _, cell in self.cells_and_names())
        wanted = getattr(module, "cell", None)
        return next((c for c in below if c is wanted or (isinstance(c, ModuleCell) and c.module is module)), None)

    def __getitem__(self, key: Any) -> nn.Cell:
        """A child, by its place or by its name: of lists of blocks."""
        return self._cells[key] if isinstance(key, str) else list(self._cells.values())[key]

    def add_flags(self, **flags: Any) -> None:
        # What `set_train` calls of every Cell.
        super().add_flags(**flags)
        if "training" in flags and "module" in self.__dict__:
            self.module.training = flags["training"]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "module" not in self.__dict__:
                raise
            return getattr(self.__dict__["module"], name)


class PreTrainedModel:
    """What transformers' Trainer looks for: it knows a model of its own framework by a base class of this name."""


class Trainable(PreTrainedModel):
    """What a `PeftModel` on mindtorch has besides, since transformers' Trainer takes it for a Module."""

    def train(self, mode: bool = True) -> Any:
        return self.set_train(mode)  # type: ignore[attr-defined]

    def eval(self) -> Any:
        return self.set_train(False)  # type: ignore[attr-defined]

    def parameters(self, recurse: bool = True) -> Any:
        return iter(self.get_parameters(expand=recurse))  # type: ignore[attr-defined]

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return self.parameters_and_names()  # type: ignore[attr-defined]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p in self.parameters():
            p.grad = None

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """The model itself, which is where it is.

        Raises:
            NotImplementedError: another dtype or device is asked for.
        """
        here = next(self.parameters()).device.type
        asked = [str(getattr(value, "type", value)) for value in (*args, *kwargs.values()) if type(value) is not bool]
        if any(value.partition(":")[0] != here for value in asked):
            raise NotImplementedError(f"to({', '.join(asked)}): move or cast the base model before get_peft_model.")
        return self


def owns(thing: Any) -> bool:
    """Whether it is a Module of mindtorch, or the Cell that mirrors one."""
    return isinstance(thing, ModuleCell) or bool(_names(thing))


def as_cell(model: Any) -> nn.Cell:
    """The Cell that mirrors a Module; the same one while there are adapters in it."""
    if isinstance(model, nn.Cell):
        return model
    cell = model.__dict__.get("peft_mirror")
    if cell is None or not getattr(cell, "peft_config", None):
        cell = _mirrored(model)
        object.__setattr__(model, "peft_mirror", cell)
    return cell


def original(model: nn.Cell) -> Any:
    """The Module that the user gave, for which the mirror stands."""
    return model.module if isinstance(model, ModuleCell) else model


def settle(root: nn.Cell) -> None:
    """Bring the Modules in line with the Cells that mirror them, wherever these stand below `root`."""
    mirrors = [cell for _, cell in root.cells_and_names() if isinstance(cell, ModuleCell)]
    for cell in mirrors:
        cell.settle()
    for p in root.get_parameters() if mirrors else ():
        if not hasattr(p, "grad"):
            p.grad = None


def describe(cell: nn.Cell, path: str) -> Site | None:
    """The Site that the mirror of a layer is."""
    names = _names(getattr(cell, "module", None))
    weight = cell._params.get("weight")
    if weight is None:
        return None
    shape = tuple(weight.shape)
    if "Linear" in names:
        return Site(path, LINEAR, shape[1], shape[0], shape, DenseOp(), cell)
    if type(cell.module).__name__ == "Conv1D" and hasattr(cell.module, "nf"):  # transformers' own, of GPT-2
        return Site(path, LINEAR, shape[0], shape[1], shape[::-1], DenseOp(), cell, transposed=True)
    if "Embedding" in names:
        op = EmbeddingOp(getattr(cell.module, "embed_scale", 1.0))
        return Site(path, "embedding", shape[0], shape[1], shape, op, cell)
    norm = next((name for name in names if name in _NORMS), None)
    if norm is not None:
        return Site(path, "norm", shape[-1], shape[-1], shape, DenseOp(), cell, channel_axis=_NORMS[norm])
    kind = next((name for name in names if name in ("Conv1d", "Conv2d", "Conv3d")), None)
    return cells.own_norm(cell, path) if kind is None else _conv(cell, path, int(kind[4]), shape)


def _conv(cell: nn.Cell, path: str, dims: int, shape: tuple[int, ...]) -> Site | None:
    module = cell.module
    if isinstance(module.padding, str) or module.padding_mode != "zeros":
        return None
    padding = tuple(n for n in module.padding for _ in range(2))
    op = ConvOp(dims, module.in_channels, tuple(module.stride), tuple(module.dilation), "pad", padding)
    sizes = (module.in_channels, module.out_channels)
    return Site(path, f"conv{dims}d", *sizes, shape, op, cell, groups=module.groups, channel_axis=1)


def input_table(model: nn.Cell) -> nn.Cell | None:
    """The Cell that stands for the layer that turns tokens into vectors."""
    return _end_of(model, "get_input_embeddings")


def output_head(model: nn.Cell) -> nn.Cell | None:
    """The Cell that stands for the layer that turns hidden states into logits."""
    return _end_of(model, "get_output_embeddings")


def _end_of(model: nn.Cell, name: str) -> nn.Cell | None:
    get = getattr(original(model), name, None)
    return model.cell_of(get()) if isinstance(model, ModuleCell) and callable(get) else None


def signature(model: nn.Cell) -> inspect.Signature:
    """What the model takes."""
    return inspect.signature(original(model).forward)


def class_of(model: nn.Cell) -> type:
    """The class of the user's own model."""
    return type(original(model))


@functools.cache
def facade(kind: type, module_class: type) -> type:
    """A subclass of a `PeftModel` class that transformers' Trainer takes."""
    trainer.teach(Trainable)
    return _taken_for(kind.__name__, (kind, Trainable), module_class)


def _mirrored(module: Any, cell: nn.Cell | None = None, known: dict[int, Any] | None = None) -> ModuleCell:
    """The Cell that mirrors a Module: the one that did before, brought up to date, or a new one."""
    if isinstance(cell, ModuleCell) and cell.module is module:
        cell.mirror(known)
        return cell
    return _mirror_class(module.__class__)(module, known)


@functools.cache
def _mirror_class(module_class: type) -> type[ModuleCell]:
    """Its class, called as the Module's is: people read it in a printed model, the Trainer asks for its `forward`."""
    return _taken_for(module_class.__name__, (ModuleCell, PreTrainedModel), module_class)


def _taken_for(name: str, bases: tuple[type, ...], module_class: type) -> type:
    """A class of Cells whose `forward` has the signature of that of a class of Modules."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self(*args, **kwargs)

    forward.__signature__ = inspect.signature(module_class.forward)  # type: ignore[attr-defined]
    first = bases[0]
    return type(name, bases, {"__module__": first.__module__, "__doc__": first.__doc__, "forward": forward})


@functools.cache
def _shim_class() -> Any:
    """A Module that calls a Cell."""
    module = importlib.import_module("mindtorch").nn.Module

    class CellShim(module):  # type: ignore[misc, valid-type]
        """Stands among Modules for a Cell; asked for anything else, it answers as the layer that was there."""

        def __init__(self, cell: nn.Cell) -> None:
            super().__init__()
            object.__setattr__(self, "cell", cell)
            base = cell.base()
            while not isinstance(base, ModuleCell):
                base = base.base()
            self.base_layer = base.module
            self.training = cell.training

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            y = self.cell(*args, **kwargs)
            if isinstance(y, Tensor) and args:
                y._device = args[0]._device
            return y

        def train(self, mode: bool = True) -> Any:
            self.cell.set_train(mode)
            return super().train(mode)

        def __getattr__(self, name: str) -> Any:
            if name in ("weight", "bias"):
                return getattr(self.cell, name)
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self._modules["base_layer"], name)

    return CellShim


def _as_parameter(p: Tensor) -> Parameter:
    """A `mindspore.Parameter` over the memory of mindtorch's; it has a `grad`, as optimizers of mindtorch expect."""
    if isinstance(p, Parameter):
        return p
    new = Parameter(Tensor(np.zeros((1,), np.float32)).astype(p.dtype), requires_grad=p.requires_grad)
    new.set_data(p)
    new.grad, new._device = None, p.device
    return new


def _as_cache(states: tuple[tuple[Tensor, Tensor], ...], module: Any) -> Any:
    """Keys and values of each layer, as today's transformers take them."""
    caches = importlib.import_module("transformers.cache_utils")
    cache = caches.DynamicCache()
    for layer, (key, value) in enumerate(states):
        cache.update(key, value, layer)
    if module.config.is_encoder_decoder:
        return caches.EncoderDecoderCache(cache, caches.DynamicCache())
    return cache


def _with_sequences(made: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """What `generate` made, its sequences of tokens changed."""
    if isinstance(made, Tensor):
        return change(made)
    made.sequences = change(made.sequences)
    return made


def _repeated(ids: Tensor, new: Tensor) -> Tensor:
    """The prompt of each sequence: several may continue one."""
    return ops.cast(ops.repeat_interleave(ids, new.shape[0] // ids.shape[0], 0), new.dtype)


def _names(thing: Any) -> list[str]:
    """The names of its classes that are mindtorch's."""
    return [kind.__name__ for kind in type(thing).__mro__ if kind.__module__.partition(".")[0] == _LIBRARY]


HOST = Host(
    "mindnlp",
    owns,
    describe,
    input_table=input_table,
    output_head=output_head,
    as_cell=as_cell,
    original=original,
    settle=settle,
    signature=signature,
    class_of=class_of,
    facade=lambda kind, model: facade(kind, class_of(model)),
)
