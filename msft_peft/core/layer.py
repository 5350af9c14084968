"""TunerLayer: a layer with the Patches of all adapters on it, and the bookkeeping for these, once for every method."""

import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from msft_peft.backend import arguments
from msft_peft.backend.arrays import HALF_DTYPES, as_float32, to_numpy, write
from msft_peft.backend.graphs import drop_compiled
from msft_peft.backend.ops import add_bias
from msft_peft.backend.tree import inherit_mode
from msft_peft.core.patch import Patch, place_of
from msft_peft.core.routing import Routing
from msft_peft.core.scale import Scale
from msft_peft.core.wrapper import View, Wrapper, wrappers
from msft_peft.errors import AdapterNameError, ConfigError, MergeError
from msft_peft.hosts import Site, describe


class TunerLayer(Wrapper):
    """A base layer and the Patches on it: y = activation(after(x, base(before(x)))) over the active adapters.

    Several active adapters act in turn, each on the output of the one before. The output has the base layer's dtype.
    `layer.lora_A["default"].weight`, `layer.scaling["default"]` and the like are views on the Patches.

    Attributes:
        base_layer: the layer that stood here.
        adapters: adapter name -> Patch.
        site: what and where it is.
        together, apart: the adapters here that serve rows of a divided batch: those whose low-rank updates are done at
            once, and the others.
        places: for the base model and for each adapter in `routing.names` the place in `together`; one past the end
            for what is not there.
        rank: the highest of those in `together`.
    """

    def __init__(self, base: nn.Cell, site: Site, routing: Routing) -> None:
        super().__init__(routing)
        self.base_layer, self.site, self.op = base, site, site.op
        self.activation = site.activation
        self.adapters = nn.CellDict()
        # What `unmerge` needs of each merged adapter: its weights, or the layer's own.
        self.backups: dict[str, dict[str, np.ndarray]] = {}
        self.views: dict[str, View] = {}
        # The weights that `residual` adapters began with: by these the base weight is short.
        self.given: dict[str, dict[str, np.ndarray]] = {}
        self.adapting = self.reweighing = self.replacing = False
        self.biased = site.bias is not None
        self.divide()
        inherit_mode(self, base)

    def construct(self, x: Tensor) -> Tensor:
        return self.adapted(x)

    def adapted(self, x: Tensor) -> Tensor:
        """The layer's output with its adapters in effect."""
        if self.routing.names:
            return self._routed(x)
        if not self.adapting:
            return self._base_output(x)
        if self.replacing:
            return self.adapters[self.active[0]].instead(x)
        if self.reweighing:
            return self._finished(self._reweighed(self.active, x), self.site.dtype)
        # The last one acts on the layer as the others made it: its input is the first to change, its output the last.
        inputs: tuple[Tensor, ...] = ()
        for name in self.active[::-1]:
            x = self.adapters[name].before(x)
            inputs = (x, *inputs)
        y = self._linear(x)
        dtype = y.dtype
        for name, own in zip(self.active, inputs):
            patch = self.adapters[name]
            adapted = patch.after(own, y)
            y = adapted if patch.invocation is None else ops.where(self.routing.invoked(y), adapted, y)
        return self._finished(y, dtype)

    def divide(self) -> None:
        """Note how the rows of the next batches are divided: which adapters are here, and how they act."""
        # Not in compiled code: so many branches there multiply the time that compiling takes.
        here = [name for name in self.routing.names if self.enabled and name in self.held()]
        ranks = {name: self.adapters[name].batched_rank for name in here}
        self.together = tuple(name for name in here if ranks[name])
        self.apart = tuple(name for name in here if not ranks[name])
        self.rank = max(ranks.values(), default=0)
        place = {name: i for i, name in enumerate(self.together)}
        self.places = (len(place), *(place.get(name, len(place)) for name in self.routing.names))

    def _routed(self, x: Tensor) -> Tensor:
        """Each row through its own adapter: one pass of the base layer for all of them, one of all low-rank ones."""
        base = self._linear(x)
        y = self._batched(x, base) if self.together else base
        for name in self.apart:
            patch = self.adapters[name]
            rows = self.routing.serves(name, base)
            if patch.invocation is not None:
                rows = ops.logical_and(rows, self.routing.invoked(base))
            y = (
                patch.served(rows, x, base, y)
                if patch.additive or patch.mingles
                else ops.where(rows, self._alone(name, x), y)
            )
        return self._finished(y, base.dtype)

    def _batched(self, x: Tensor, y: Tensor) -> Tensor:
        """y_i + B_i·A_i·x_i for every row i, with the factors of its own adapter, all rows in two batched products.

        So the cost does not grow with the number of adapters (as in Punica: Chen et al. 2023, arXiv:2310.18547).
        """
        downs = [_filled_up(self.adapters[name].down(), self.rank) for name in self.together]
        ups = [_filled_up(self.adapters[name].up(), self.rank) for name in self.together]
        place, rows = self.routing.place(self.places, y), (y.shape[0], -1)
        h = ops.matmul(
            ops.reshape(ops.cast(x, ms.float32), (*rows, x.shape[-1])),
            ops.transpose(_pick(downs, place, self.rank), (0, 2, 1)),
        )
        return ops.add(y, ops.reshape(ops.matmul(h, _pick(ups, place, self.rank)), y.shape))

    def _alone(self, name: str, x: Tensor) -> Tensor:
        patch = self.adapters[name]
        if patch.replaces:
            return patch.instead(x)
        if patch.reweighs:
            return self._reweighed((name,), x)
        x = patch.before(x)
        return patch.after(x, self._linear(x))

    def _reweighed(self, names: tuple[str, ...], x: Tensor) -> Tensor:
        """What the layer makes of x with the weight that these adapters make of its own; the activation left out."""
        patch = self.adapters[names[0]]
        w, b = patch.base_weight(), self.base_layer.bias if self.biased else None
        for name in names:
            w, b = self.adapters[name].merged(w, b)
        y = self.op(patch.cast(x), w)
        return y if b is None else ops.add(y, ops.reshape(b, (-1,) + (1,) * (len(self.site.shape) - 2)))

    def _finished(self, y: Tensor, dtype: Any) -> Tensor:
        """The output, from the sum: in the base layer's dtype, with the activation that it fuses."""
        if y.dtype != dtype:
            y = ops.cast(y, dtype)
        return y if self.activation is None else self.activation(y)

    def _base_output(self, x: Tensor) -> Tensor:
        return self.base_layer(x)

    def _linear(self, x: Tensor) -> Tensor:
        """The base layer without the activation that it may have fused: deltas go in before that."""
        if self.activation is None:
            return self._base_output(x)
        w = self.site.from_storage(self.base_layer.weight)
        return add_bias(self.op.base(x, w), self.base_layer.bias)

    # --- what is here -------------------------------------------------------------------------------------------

    def base(self) -> nn.Cell:
        return self.base_layer

    def held(self) -> Mapping[str, nn.Cell]:
        return self.adapters._cells

    def inside(self) -> Mapping[str, nn.Cell]:
        # There are none among the adapters, of which there may be hundreds.
        return {"base_layer": self.base_layer}

    def add(self, name: str, patch: Patch) -> None:
        """Put an adapter here, inactive; one of the same name is replaced."""
        self.discard(name)
        self.adapters[name] = patch.set_train(self.training)
        patch.routing = self.routing
        for holder, attribute, key in () if patch.rides else patch.placed():
            place, rest = place_of(key)
            if place not in self.views:
                self.views[place] = View()
                self._show(place)
            self.views[place].put(name, rest, getattr(holder, attribute))
        self._cells.move_to_end("adapters")
        if patch.residual:
            self.given[name] = patch.snapshot()
            self._write_weight(patch.remainder(self._full_weight()))
        self.introduce()

    def _show(self, place: str) -> None:
        """Hang a view into the tree, below plain Cells if its place has several parts."""
        holder: nn.Cell = self
        *outer, last = place.split(".")
        for part in outer:
            holder = holder._cells.setdefault(part, nn.Cell())
        holder._cells[last] = self.views[place]

    def replace_weight(self, name: str, attribute: str, parameter: Parameter, shared: bool = False) -> None:
        """Put another Parameter, of the same name, in the place of an adapter's weight, or of a shared one."""
        patch = self.adapters._cells[name]
        holder = patch.shared if shared else patch
        holder.put(attribute, parameter)
        place, rest = place_of(holder.keys[attribute])
        self.views[place].put(name, rest, parameter)

    def discard(self, name: str) -> None:
        if name not in self.adapters._cells:
            return
        if name in self.given:
            self.give_back(name)
            del self.given[name]
            for other in self.given:
                self._write_weight(self.adapters[other].retaken(self._full_weight()))
        patch = self.adapters._cells.pop(name)
        for place in {place_of(key)[0] for _, _, key in patch.placed() if not patch.rides}:
            self.views[place].drop(name)
            if not len(self.views[place]):
                del self.views[place]
                top = place.partition(".")[0]
                if not any(other.partition(".")[0] == top for other in self.views):
                    del self._cells[top]
        self.activate(n for n in self.active if n != name)

    # --- switches -----------------------------------------------------------------------------------------------

    def activate(self, names: Iterable[str]) -> None:
        super().activate(names)
        self._switch()
        self.introduce()

    def introduce(self) -> None:
        """Tell each adapter here of the others."""
        held = self.held()
        for name, patch in held.items():
            patch.meet({other: held[other] for other in held if other != name})

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        self._switch()

    def _switch(self) -> None:
        # One plain attribute, since it is what compiled code reads.
        self.adapting = bool(self.enabled and self.active and not self.backups)
        self.reweighing = bool(self.active) and all(self.adapters[name].reweighs for name in self.active)
        self.replacing = len(self.active) == 1 and self.adapters[self.active[0]].replaces

    # --- merging ------------------------------------------------------------------------------------------------

    def _full_weight(self) -> Tensor:
        """The base weight in torch's layout and at least float32."""
        return self.site.from_storage(_at_least_float32(self.site.weight))

    def give_back(self, name: str) -> None:
        """Write what the base weight is without what the adapter took from it; nothing else changes."""
        self._write_weight(self.adapters[name].regained(self._full_weight(), self.given[name]))

    def _write_weight(self, w: Tensor) -> None:
        """Write the base weight, given in torch's layout."""
        write(self.site.weight, self.site.to_storage(w, tuple(self.site.weight.shape)))

    def merged_into(self, names: Iterable[str]) -> tuple[Tensor, Tensor | None]:
        """The base weight (in torch's layout) and bias with these adapters folded in; nothing is written."""
        w = self._full_weight()
        b = None if self.site.bias is None else _at_least_float32(self.site.bias)
        for name in names:
            w, b = self.adapters[name].merged(w, b)
        return w, b

    def merge(self, names: Iterable[str]) -> None:
        """Fold adapters into the base weight, in place; the weight is written once.

        Cost: one weight-sized temporary in float32. A copy of the weight is kept on the host until `unmerge` where
        subtracting the deltas would not give its very bits back: in half precision, and for methods that do more
        than add. Elsewhere the adapter's own weights are kept, so that they may change in the meantime.
        """
        w, b = self.merged_into(())
        for name in names:
            patch = self.adapters[name]
            if patch.rides:
                self.backups[name] = {}
                continue
            self.backups[name] = patch.snapshot() if self._subtracts(patch) else self._stored(w, b)
            w, b = patch.merged(w, b)
        self._write_weight(w)
        if b is not None:
            write(self.site.bias, b)
        self._switch()

    def merge_for_good(self, names: Iterable[str]) -> None:
        """Fold adapters into the base weight with no way back."""
        self.merge(names)
        for name in self.backups:
            self.given.pop(name, None)
        self.backups.clear()

    def unmerge(self) -> None:
        """Take all merged adapters out of the base weight again."""
        for name in reversed(list(self.backups)):
            patch, backup = self.adapters[name], self.backups.pop(name)
            if self._subtracts(patch) and not patch.rides:
                self._write_weight(self._full_weight() - patch.delta_of(backup))
            else:
                for attribute, value in backup.items():
                    write(getattr(self.site, attribute), value)
        self._switch()

    def _subtracts(self, patch: Patch) -> bool:
        return patch.additive and self.site.weight.dtype not in HALF_DTYPES

    def _stored(self, w: Tensor, b: Tensor | None) -> dict[str, np.ndarray]:
        """Copies of a weight and a bias, as the layer stores them."""
        parts = [("weight", self.site.weight, self.site.to_storage(w, tuple(self.site.weight.shape)))]
        if b is not None:
            parts.append(("bias", self.site.bias, b))
        return {attribute: to_numpy(ops.cast(value, p.dtype)).copy() for attribute, p, value in parts}

    def check_merge(self, names: Iterable[str], finite: bool) -> None:
        """Raise MergeError if one of these cannot be merged or, with `finite`, would write a NaN or an infinity."""
        w, b = self.merged_into(()) if finite else (None, None)
        for name in names:
            patch = self.adapters[name]
            patch.check_mergeable()
            if self.backups and patch.reads_base:
                raise MergeError(
                    f"Adapter {name} depends on the base weight of {self.site.path}, into which "
                    f"{list(self.backups)} are merged: unmerge them first, and merge all of them in one call."
                )
            if not finite or patch.rides:
                continue
            w, b = patch.merged(w, b)
            stored = [as_float32(to_numpy(ops.cast(p, self.site.dtype))) for p in (w, b) if p is not None]
            if not all(np.isfinite(array).all() for array in stored):
                raise MergeError(
                    f"NaNs detected in the merged weights. The adapter {name} seems to be broken: at {self.site.path}."
                )

    # --- HF's names for the same things -------------------------------------------------------------------------

    @property
    def merged_adapters(self) -> list[str]:
        return list(self.backups)

    @property
    def merged(self) -> bool:
        return bool(self.backups)

    @property
    def active_adapters(self) -> list[str]:
        return list(self.active)

    @property
    def disable_adapters(self) -> bool:
        return not self.enabled

    @property
    def weight(self) -> Parameter:
        return self.site.weight

    @property
    def bias(self) -> Parameter | None:
        return self.site.bias

    def scales(self) -> dict[str, Scale]:
        """The scales of the adapters here, as far as their method has one; a tied layer's is its partner's affair."""
        found = {name: getattr(patch, "scale", None) for name, patch in self.held().items() if not patch.rides}
        return {name: scale for name, scale in found.items() if isinstance(scale, Scale)}

    def rescale(self, numbers: Mapping[str, float]) -> None:
        """Set the scalings of adapters here; compiled code sees it.

        Raises:
            MergeError: an adapter is merged here; a scaling cannot reach what is in the base weight.
            ConfigError: a scaling that is no finite number.
        """
        self.check_unmerged()
        bad = {name: number for name, number in numbers.items() if not math.isfinite(number)}
        if bad:
            raise ConfigError(f"a scaling at {self.site.path} must be a finite number, got {bad}")
        stale = [self.scales()[name].set(number) for name, number in numbers.items()]
        if any(stale):
            drop_compiled()

    def check_unmerged(self) -> None:
        if self.merged:
            raise MergeError(f"Adapters are merged at {self.site.path}: unmerge them before you change a scaling.")

    def set_scale(self, adapter: str, scale: float) -> None:
        """Let an adapter count `scale` times what its config says; one that is not here is passed over, as in HF."""
        self._check_number(scale)
        self.rescale({name: scale * found.initial for name, found in self.scales().items() if name == adapter})

    def scale_layer(self, scale: float) -> None:
        """Let the active adapters count `scale` times what they do now."""
        self._check_number(scale)
        self.rescale({name: found.number * scale for name, found in self.scales().items() if name in self.active})

    def _check_number(self, scale: Any) -> None:
        if not isinstance(scale, Real):
            raise ConfigError(f"a scaling at {self.site.path} must be a finite number, got {scale!r}")

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo `scale_layer(scale)`; without a number, let the active adapters count as their configs say."""
        if scale is not None:
            self._check_number(scale)
        if scale == 0:
            raise ZeroDivisionError("unscale_layer(0): what was multiplied by zero cannot be restored; leave it out")
        active = {name: found for name, found in self.scales().items() if name in self.active}
        self.rescale({name: s.initial if scale is None else s.number / scale for name, s in active.items()})

    def get_base_layer(self) -> nn.Cell:
        return self.base_layer

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What an additive adapter adds to the base weight, as the layer stores it.

        Raises:
            AdapterNameError: it has nothing here.
        """
        if arguments.adapter_name(adapter) not in self.held():
            raise AdapterNameError(f"Adapter {adapter} not found at {self.site.path}. There are {list(self.held())}.")
        return self.site.to_storage(self.adapters[adapter].delta_weight(), tuple(self.weight.shape))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether what the adapter does here is to add to a weight that a low-rank product can be added to."""
        patch = self.held().get(adapter_name)
        fits = self.site.groups == 1 and self.site.kind != "parameter"
        return fits and isinstance(patch, Patch) and patch.additive and patch.alone and patch.invocation is None

    def __getattr__(self, name: str) -> Any:
        """`layer.scaling`, `layer.r`, ...: what every Patch here knows, by adapter name.

        Anything else is asked of the base layer, for code that reads its attributes (`embedding_table`, `gamma`).
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            cells = self.__dict__.get("_cells", {})
            if "adapters" not in cells or name.startswith("_"):
                raise
            patches = cells["adapters"]._cells
            if patches and all(_has(patch, name) for patch in patches.values()):
                return {key: getattr(patch, name) for key, patch in patches.items()}
            return getattr(cells["base_layer"], name)


def _at_least_float32(p: Parameter) -> Tensor:
    return ops.cast(p, ms.float32) if p.dtype in HALF_DTYPES else p


def _filled_up(w: Tensor, rank: int) -> Tensor:
    """(r, n) -> (rank, n), with zeros."""
    missing = rank - w.shape[0]
    return ops.concat((w, ops.zeros((missing, w.shape[1]), w.dtype)), 0) if missing else w


def _pick(parts: list[Tensor], place: Tensor, rank: int) -> Tensor:
    """(B, rank, n): for each row the part (rank, n) that `place` (B,) says; zeros for one past the end."""
    n = parts[0].shape[1]
    stack = ops.concat((*parts, ops.zeros((rank, n), parts[0].dtype)), 0)
    return ops.gather(ops.reshape(stack, (-1, rank, n)), place, 0)


def _has(patch: Patch, name: str) -> bool:
    return name in patch.__dict__ or name in patch._cells or isinstance(getattr(type(patch), name, None), property)


def site_of(cell: nn.Cell, path: str) -> Site | None:
    """The Site that a cell is, wrapped or not; None if it is no layer that can be tuned."""
    return cell.site if isinstance(cell, TunerLayer) else describe(cell, path)


def introduce(root: nn.Cell) -> None:
    """Tell the adapters of each layer of the others: what must follow when the weights of one were written."""
    for _, wrapper in wrappers(root):
        if isinstance(wrapper, TunerLayer):
            wrapper.introduce()
