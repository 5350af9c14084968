"""Patch: one adapter's weights and mathematics at one Site."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import HeUniform, Initializer, initializer

from msft_peft.backend.arrays import FLOAT_DTYPES, HALF_DTYPES, to_numpy, write
from msft_peft.config import PeftConfig
from msft_peft.hosts import Site

# Before the names of shared weights in a Patch's snapshot.
_SHARED = "shared."


class Weights(nn.Cell):
    """Weights of an adapter, each with its key in HF's files.

    Attributes:
        dtype: theirs.
        keys: attribute of each weight -> its key, below the path of the layer that it belongs to.
        fixed: attributes of weights that are never trained.
        counted: those of them that HF counts as parameters; the others are buffers there.
        unsaved: attributes of weights that files do not hold, since they are made anew from the config.
    """

    def __init__(self, site: Site, autocast: bool, low_cpu_mem_usage: bool) -> None:
        super().__init__()
        self.undrawn = low_cpu_mem_usage
        self.keys: dict[str, str] = {}
        self.fixed: set[str] = set()
        self.counted: set[str] = set()
        self.unsaved: set[str] = set()
        # Half-precision adapters lose small updates, so they are kept in float32 unless told otherwise.
        halves = HALF_DTYPES if autocast else ()
        self.dtype = ms.float32 if site.dtype in halves or site.dtype not in FLOAT_DTYPES else site.dtype

    def weight(
        self,
        key: str,
        shape: tuple[int, ...],
        init: str | Initializer | np.ndarray,
        attribute: str | None = None,
        fixed: bool = False,
        saved: bool = True,
        dtype: Any = None,
    ) -> Parameter:
        """A new weight, under `key` in checkpoint files ("lora_A.weight").

        Args:
            key: its key below the layer's path.
            shape: in torch's layout.
            init: how to draw it, or its values.
            attribute: the attribute that holds it; by default named after the key, lora_A or lora_B_bias.
            fixed: it is never trained.
            saved: files hold it.
            dtype: its own, where it is not that of the others.
        """
        dtype = dtype or self.dtype
        attribute = attribute or key.removesuffix(".weight").replace(".", "_")
        self.keys[attribute] = key
        if fixed:
            self.fixed.add(attribute)
        if not saved:
            self.unsaved.add(attribute)
        if isinstance(init, np.ndarray):
            values = Tensor(init, dtype)
        elif self.undrawn:
            # Not a number, so that weights which were never loaded cannot go unnoticed.
            values = Tensor(np.full(shape, np.nan, np.float32), dtype)
        else:
            values = initializer(init, shape, dtype)
        return Parameter(values, name=attribute, requires_grad=not fixed)

    def put(self, attribute: str, parameter: Parameter) -> None:
        """Let another Parameter be one of its weights."""
        self._params[attribute] = parameter

    def shape_of(self, attribute: str) -> tuple[int, ...]:
        """The shape of a weight in files: its own, unless it is stored padded."""
        return tuple(getattr(self, attribute).shape)

    def blocks_of(self, attribute: str) -> int:
        """How many parts a padded weight has, see `backend.tree.Named`."""
        return 1

    def kept_of(self, attribute: str) -> tuple[int, tuple[int, ...]] | None:
        """Which part of a weight is kept in files, see `backend.tree.Named`; None for all of it."""
        return None

    def snapshot(self) -> dict[str, np.ndarray]:
        """Copies of the weights, by attribute."""
        return {attribute: to_numpy(getattr(self, attribute)).copy() for attribute in self.keys}

    def restore(self, values: Mapping[str, np.ndarray]) -> None:
        """Write the weights that `snapshot` copied."""
        for attribute, value in values.items():
            write(getattr(self, attribute), value)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: these weights stand in the tree, and in a `state_dict`, under the paths that HF gives them."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Nothing, see `_save_to_state_dict`."""


class Shared(Weights):
    """Weights that all Patches of one adapter read: each of these holds this Cell, so that it lives as they do.

    In HF's files their keys stand beside the base model's, "base_model.vera_A". In the tree they stand at the layer of
    the adapter's first Patch, which `leads`.
    """

    def __init__(self, sites: Iterable[Site], config: PeftConfig, autocast: bool, low_cpu_mem_usage: bool) -> None:
        sites = list(sites)
        super().__init__(sites[0], autocast, low_cpu_mem_usage)
        self.setup(sites, config)

    def setup(self, sites: list[Site], config: Any) -> None:
        """Declare the weights, for an adapter at these sites."""
        raise NotImplementedError


class Patch(Weights):
    """The delta Cell of one adapter at one Site. It knows no adapter names and does no bookkeeping.

    A method writes `setup` and, if it is additive, `delta_weight`; the other hooks have defaults that follow from it.
    The base layer's own weight and bias are `site.weight` and `site.bias` in `setup`, and `base_weight()` and
    `site.layer.bias` in the hooks.

    Attributes:
        site: where it sits.
        op: how the layer there applies a weight.
        shared: what it shares with the adapter's other Patches, if the method has such weights.
        routing: what all adapted layers of the model know in a forward pass, see `core.routing`; in the model only.
        leads: it is the one at whose layer the shared weights stand in the tree.
        residual: the base weight gives up what the fresh adapter adds, so that the model's output stays as it was; it
            is given back when the adapter is taken out.
        alone: where it is `residual`: it goes with no other adapter, and a warning says so.
        auxiliary: it is no update of a target layer, but something beside those.
        reads_base: its hooks measure the base weight, so that it cannot be merged on top of what is merged already.
        mingles: what becomes of a row depends on the rows beside it, so that `served` is asked, additive or not.
        reweighs: the layer applies what `merged` makes of its weight; `before` and `after` are asked only where the
            layer also serves another method, or other rows of a batch.
        builds_delta: `delta_weight` takes little beside a product with it, and nothing else is done to the input: it
            `reweighs` where the layer is of its own dtype, so that there is one product of the layer's size, not two.
        replaces: while it acts alone, `instead` is asked for the layer's output, and the base layer is not run.
        turned: its weights are transposed in files.
        rides: its layer's weight is tied to that of another layer, where a Patch of the same adapter merges for both.
        invocation: token ids from whose last occurrence on it acts; None if it acts on all tokens.
        constants: how many numbers HF counts among the parameters that are constants here.
        casts_input: inputs are cast to the dtype of its weights.
    """

    residual = False
    alone = True
    auxiliary = False
    reads_base = False
    rides = False
    mingles = False
    reweighs = False
    builds_delta = False
    replaces = False
    turned = False
    leads = False
    # What its initialisation is called, where warnings are given of a `residual` adapter.
    title = "This adapter"
    invocation: tuple[int, ...] | None = None
    constants = 0
    casts_input = True
    routing: Any = None

    def __init__(
        self,
        site: Site,
        config: PeftConfig,
        autocast: bool = True,
        low_cpu_mem_usage: bool = False,
        shared: Any = None,
    ) -> None:
        super().__init__(site, autocast, low_cpu_mem_usage)
        self.site, self.op, self.shared = site, site.op, shared
        self.setup(site, config)
        self.reweighs = self.reweighs or (self.builds_delta and self.dtype == site.dtype)

    def setup(self, site: Site, config: Any) -> None:
        """Declare the weights, and keep what the formula needs of `config`."""
        raise NotImplementedError

    def placed(self) -> list[tuple[Weights, str, str]]:
        """(holder, attribute, key) of each weight that stands in the tree at this layer."""
        holders: tuple[Weights, ...] = (self, self.shared) if self.leads else (self,)
        return [(holder, attribute, key) for holder in holders for attribute, key in holder.keys.items()]

    def snapshot(self) -> dict[str, np.ndarray]:
        # The shared weights that may change belong to what this one does.
        values = {} if self.shared is None else self.shared.snapshot()
        return super().snapshot() | {_SHARED + a: v for a, v in values.items() if a not in self.shared.fixed}

    def restore(self, values: Mapping[str, np.ndarray]) -> None:
        super().restore({a: v for a, v in values.items() if not a.startswith(_SHARED)})
        if self.shared is not None:
            self.shared.restore({a.removeprefix(_SHARED): v for a, v in values.items() if a.startswith(_SHARED)})

    def delta_of(self, values: Mapping[str, np.ndarray]) -> Tensor:
        """`delta_weight` for other values of the weights."""
        now = self.snapshot()
        self.restore(values)
        try:
            # A copy: it may be a weight itself, which changes back.
            return Tensor(to_numpy(self.delta_weight()).copy())
        finally:
            self.restore(now)

    def cast(self, x: Tensor) -> Tensor:
        """Give a layer's input the dtype of this Patch's weights."""
        return x if x.dtype == self.dtype or not self.casts_input else ops.cast(x, self.dtype)

    def base_weight(self) -> Tensor:
        """The base layer's own weight, in torch's layout and this Patch's dtype: for hooks, which may be compiled."""
        # Not `site.weight`: a property of an object that is no Cell is a constant to compiled code.
        return ops.cast(self.site.from_storage(getattr(self.site.layer, self.site.weight_name)), self.dtype)

    def delta_weight(self) -> Tensor:
        """What an additive method adds to the base weight, in torch's layout."""
        raise NotImplementedError

    def before(self, x: Tensor) -> Tensor:
        """What the base layer is given instead of x."""
        return x

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """What becomes of the layer's output y for input x, which `before` has gone over."""
        # The input of an embedding is token ids.
        return y + self.op(x if self.site.kind == "embedding" else self.cast(x), self.delta_weight())

    def instead(self, x: Tensor) -> Tensor:
        """The layer's output for x, where it `replaces` the layer: what `after(x, base(x))` would be."""
        raise NotImplementedError

    @property
    def batched_rank(self) -> int:
        """The rank of B·A; 0 if the Patch does more to an output than to add B·A·x, in float32."""
        return 0

    def down(self) -> Tensor:
        """(rank, in): A, the scaling included; where `batched_rank` is not 0."""
        raise NotImplementedError

    def up(self) -> Tensor:
        """(rank, out): B, transposed; where `batched_rank` is not 0."""
        raise NotImplementedError

    def served(self, rows: Tensor, x: Tensor, base: Tensor, y: Tensor) -> Tensor:
        """y, with `after(x, base)` in its place where `rows` says so; for additive methods, and those that mingle.

        Args:
            rows: (B, 1, ...) or (B, T, 1), bool.
            x: the layer's input.
            base: what the base layer makes of it.
            y: the output so far, from other adapters' rows.
        """
        return ops.where(rows, self.after(x, base), y)

    def merged(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the base layer with this adapter folded in; w in torch's layout, both at least float32.

        Raises:
            MergeError: this one cannot be folded in.
        """
        return w + self.delta_weight(), b

    def remainder(self, w: Tensor) -> Tensor:
        """What the base weight w becomes when a fresh `residual` adapter is put in."""
        return w - self.delta_weight()

    def regained(self, w: Tensor, given: Mapping[str, np.ndarray]) -> Tensor:
        """The base weight once a `residual` adapter is taken out: w and what it gave up; `given` was the fresh one."""
        return w + self.delta_of(given)

    def retaken(self, w: Tensor) -> Tensor:
        """The base weight once another `residual` adapter has given back to it, while this one stays."""
        return w

    def check_values(self, attribute: str, values: np.ndarray) -> None:
        """Raise LoadError if a weight cannot have these values, of its shape; asked before any are written."""
        return None

    def untrainable(self) -> str:
        """Why its weights, as they are now, cannot be trained; empty if they can. Asked whenever they are to be."""
        return ""

    def meet(self, others: Mapping[str, "Patch"]) -> None:
        """Be told of the other adapters at the layer: whenever adapters come, go, are chosen or are loaded."""

    def check_mergeable(self) -> None:
        """Raise `MergeError` if this Patch cannot be merged where it sits."""
        return None

    @property
    def additive(self) -> bool:
        """Whether all that this Patch does is to add `delta_weight` to the base weight."""
        return type(self).merged is Patch.merged


class Reference:
    """Another Cell, which is to be no child of the one that knows it."""

    def __init__(self, cell: Any) -> None:
        self.cell = cell


def he_uniform() -> Initializer:
    """How torch draws the weights of a linear layer."""
    return HeUniform(negative_slope=math.sqrt(5))


# What HF's modules call the tensors of their own.
_OWN = (
    *("weight", "bias", "std_prior", "expert_weights_prior", "gaussian_var_prior", "expert_weights"),
    *("module_logits", "X", "Xd", "Xu", "zeros", "U_low", "S_low", "V_low"),
)


def place_of(key: str) -> tuple[str, str]:
    """Where in a key HF puts the adapter's name: after the first part of the pair.

    "lora_A.weight" -> ("lora_A", "weight"), but "lora_embedding_A" -> ("lora_embedding_A", ""). Of a list of modules
    each adapter has its own: "peanut_encoders.0.weight" -> ("peanut_encoders", "0.weight").
    """
    stem, _, leaf = key.rpartition(".")
    if not stem or not (leaf in _OWN or leaf.isdigit()):
        return key, ""
    outer, _, number = stem.rpartition(".")
    return (outer, f"{number}.{leaf}") if number.isdigit() else (stem, leaf)
