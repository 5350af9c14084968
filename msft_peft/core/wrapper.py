"""What stands in a model's tree in place of a layer, and how it is found there."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mindspore import Parameter, nn, ops

from msft_peft.backend.tree import inherit_mode
from msft_peft.core.patch import Patch
from msft_peft.core.routing import Routing


class View(nn.Cell):
    """`layer.lora_A` as HF's scripts know it: adapter name -> weight, over parameters that belong to the Patches.

    It stands in the tree before them, so that a parameter's path, and with it its name, is HF's:
    `q_proj.lora_A.default.weight`.
    """

    def put(self, name: str, rest: str, parameter: Parameter) -> None:
        if not rest:
            self._params[name] = parameter
            return
        *number, leaf = rest.split(".")
        holder = self._cells.setdefault(name, nn.CellList() if number else nn.Cell())
        for part in number:
            holder = holder._cells.setdefault(part, nn.Cell())
        holder._params[leaf] = parameter

    def drop(self, name: str) -> None:
        self._cells.pop(name, None)
        self._params.pop(name, None)

    def keys(self) -> list[str]:
        return [*self._cells, *self._params]

    def __getitem__(self, name: str) -> Any:
        return self._cells[name] if name in self._cells else self._params[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __contains__(self, name: object) -> bool:
        return name in self._cells or name in self._params

    def __len__(self) -> int:
        return len(self._cells) + len(self._params)


class Wrapper(nn.Cell):
    """Stands for a layer of the base model, and holds what each adapter has there.

    Attributes:
        active: the adapters in use, those that are not here left out.
        trained: the adapters whose weights get gradients, for compiled code, which cannot ask a Parameter.
        enabled: False while all adapters are switched off.
        routing: what all wrappers of the model share.
    """

    def __init__(self, routing: Routing) -> None:
        super().__init__()
        self.active: tuple[str, ...] = ()
        self.trained: tuple[str, ...] = ()
        self.enabled = True
        self.routing = routing

    def base(self) -> nn.Cell:
        """The layer that stood here before."""
        raise NotImplementedError

    def held(self) -> Mapping[str, nn.Cell]:
        """What the adapters have here: name -> Cell."""
        raise NotImplementedError

    def discard(self, name: str) -> None:
        """Take one adapter out; without effect if it has nothing here."""
        raise NotImplementedError

    def inside(self) -> Mapping[str, nn.Cell]:
        """The cells in which further wrappers may stand, by attribute."""
        return self._cells

    def released(self) -> None:
        """Undo what was done to the layer, when it takes its place again."""

    def activate(self, names: Iterable[str]) -> None:
        self.active = tuple(name for name in names if name in self.held())

    def enable_adapters(self, enabled: bool) -> None:
        self.enabled = enabled

    def set_requires_grad(self, names: Iterable[str], requires_grad: bool) -> None:
        names = [name for name in names if name in self.held()]
        self.trained = tuple({*self.trained, *names} if requires_grad else {*self.trained} - {*names})
        for cell in (self.held()[name] for name in names):
            fixed = {id(p) for p in fixed_in(cell)}
            for p in cell.get_parameters():
                p.requires_grad = requires_grad and id(p) not in fixed


def fixed_in(cell: nn.Cell) -> list[Parameter]:
    """The parameters that an adapter has there and never trains."""
    return [getattr(holder, attribute) for holder in _holders(cell) for attribute in getattr(holder, "fixed", ())]


def buffers_in(cell: nn.Cell) -> list[Parameter]:
    """Those of them that HF does not count as parameters."""
    counted = {id(getattr(holder, a)) for holder in _holders(cell) for a in getattr(holder, "counted", ())}
    return [p for p in fixed_in(cell) if id(p) not in counted]


def _holders(cell: nn.Cell) -> list[nn.Cell]:
    """An adapter's part there, and what that shares with its others."""
    return [cell, cell.shared] if isinstance(cell, Patch) and cell.shared is not None else [cell]


class ModulesToSaveWrapper(Wrapper):
    """A layer that adapters train whole: each has a copy of its own, and the original stays as it was.

    Attributes:
        original_module: the layer that stood here.
        modules_to_save: adapter name -> its copy.
    """

    def __init__(self, original: nn.Cell, routing: Routing) -> None:
        super().__init__(routing)
        self.original_module = original
        self.modules_to_save = nn.CellDict()
        inherit_mode(self, original)

    def construct(self, *args: Any, **kwargs: Any) -> Any:
        if self.routing.names:
            y = self.original_module(*args, **kwargs)
            for name in self.routing.names:
                if self.enabled and name in self.modules_to_save.keys():
                    y = ops.where(self.routing.serves(name, y), self.modules_to_save[name](*args, **kwargs), y)
            return y
        if self.enabled and self.active:
            return self.modules_to_save[self.active[0]](*args, **kwargs)
        return self.original_module(*args, **kwargs)

    def base(self) -> nn.Cell:
        return self.original_module

    def held(self) -> Mapping[str, nn.Cell]:
        return self.modules_to_save._cells

    def add(self, name: str, module: nn.Cell) -> None:
        """Put an adapter's copy here, inactive; one of the same name is replaced."""
        # Past CellDict's own check, which refuses containers: a head may well be a SequentialCell.
        self.modules_to_save._cells[name] = module

    def discard(self, name: str) -> None:
        self.modules_to_save._cells.pop(name, None)
        self.activate(n for n in self.active if n != name)

    @property
    def weight(self) -> Parameter:
        return self.current().weight

    @property
    def bias(self) -> Parameter | None:
        return self.current().bias

    def current(self) -> nn.Cell:
        """The copy in use, or the original."""
        return self.held()[self.active[0]] if self.enabled and self.active else self.original_module

    def __getattr__(self, name: str) -> Any:
        """Anything else is asked of the copy in use, for code that reads the layer's attributes."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "original_module" not in self.__dict__.get("_cells", {}):
                raise
            return getattr(self.current(), name)


def copy_of(module: nn.Cell) -> nn.Cell:
    """A trainable copy of a layer."""
    twin = copy.deepcopy(module)
    for p in twin.get_parameters():
        p.requires_grad = True
    return twin


def outer_cells(root: nn.Cell) -> dict[str, nn.Cell]:
    """Every cell below `root` that a config can name, by path: what is inside wrappers is their own affair."""
    inside = tuple(path + "." for path, _ in wrappers(root))
    return {path: cell for path, cell in root.cells_and_names() if path and not path.startswith(inside)}


def wrappers(root: nn.Cell) -> list[tuple[str, Wrapper]]:
    """Every wrapper below `root` with its path, in network order."""
    found: list[tuple[str, Wrapper]] = []
    seen: set[int] = set()
    _find_wrappers(root, "", found, seen)
    return found


def _find_wrappers(cell: nn.Cell, path: str, found: list[tuple[str, Wrapper]], seen: set[int]) -> None:
    if id(cell) in seen:
        return
    seen.add(id(cell))
    if isinstance(cell, Wrapper):
        found.append((path, cell))
    inside = cell.inside() if isinstance(cell, Wrapper) else cell._cells
    for key, child in inside.items():
        if child is not None:
            _find_wrappers(child, f"{path}.{key}" if path else key, found, seen)
