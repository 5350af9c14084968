"""Trainable tokens: only some rows of an embedding are trained, and only those are saved."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from msft_peft.backend.arrays import as_float32, to_numpy, write
from msft_peft.config import PeftConfig, TargetedConfig
from msft_peft.core.layer import site_of
from msft_peft.core.patch import Patch, Reference
from msft_peft.core.tied import Tied
from msft_peft.core.tuner import Tuner
from msft_peft.errors import ConfigError
from msft_peft.hosts import Site, input_table
from msft_peft.registry import Method

DELTA = "trainable_tokens_delta"
# In a snapshot: the base weight's rows.
_TABLE = "table"


@dataclass
class TrainableTokensConfig(TargetedConfig):
    """Settings of trainable tokens as a method of their own; beside LoRA see `LoraConfig.trainable_token_indices`.

    Args:
        token_indices: the tokens whose rows are trained.
        target_modules: embeddings, or dense layers that score tokens; None for the model's input embedding
            (`get_input_embeddings`, or else a layer called embed_tokens). A head that is tied to it follows.
        init_weights: begin with the rows as they are; False draws N(0, 1).

    Raises:
        ConfigError: indices that are no list of numbers. Those that the layer does not have are refused when a model
            is wrapped.

    Differs: HF refuses to have two adapters active whose tokens overlap; here what they gain adds up.
        `exclude_modules`, `layers_to_transform` and `modules_to_save` work here.
    """

    beyond_hf = ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")

    peft_type: str | None = "TRAINABLE_TOKENS"
    token_indices: list[int] = field(default_factory=list)
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.token_indices, list | tuple) or not all(type(i) is int for i in self.token_indices):
            raise ConfigError(f"`token_indices` must be a list of int, got {self.token_indices!r}")
        self.token_indices = list(self.token_indices)


class TokensPatch(Patch):
    """E'[i] = delta[k] where i = indices[k], else E[i]: new rows in the place of some rows of a weight.

    Weights:
        trainable_tokens_delta (len(indices), dim): the rows themselves, at first those of the base weight.

    Works on an embedding, and on a dense layer as a head: its rows are the scores of tokens.

    Args:
        site: where the rows are.
        config: the adapter's config.
        autocast: see `Patch`.
        indices: the rows.
        key: the weight's key in files.
    """

    auxiliary = True

    def __init__(
        self, site: Site, config: PeftConfig, autocast: bool = True, indices: Sequence[int] = (), key: str = DELTA
    ) -> None:
        self.place = (_checked(indices, site), key)
        super().__init__(site, config, autocast)

    def setup(self, site: Site, config: Any) -> None:
        indices, key = self.place
        rows = as_float32(to_numpy(site.weight)[indices])
        self.delta = self.weight(key, rows.shape, rows, attribute="delta")
        self._remember()

    def _remember(self) -> None:
        indices, _ = self.place
        # Each row's place among the new ones; one past the last, where a row of zeros stands, if it is none of them.
        places = np.full(self.site.shape[0], len(indices), np.int32)
        places[indices] = np.arange(len(indices))
        self.places, self.indices = Tensor(places), Tensor(np.array(indices, np.int32))
        self.nothing = Tensor(np.zeros((1, self.site.shape[1])), self.dtype)

    def rows(self) -> Tensor:
        """(len(indices), dim): the new rows."""
        return self.delta

    def change(self, table: Tensor) -> Tensor:
        """(len(indices) + 1, dim): what the rows gain on those of `table`; the last one stands for all others."""
        rows = self.rows()
        # `cast_adapter_dtype` may have given the rows another dtype than they had at first.
        gained = ops.sub(rows, ops.cast(ops.gather(table, self.indices, 0), rows.dtype))
        return ops.concat((gained, ops.cast(self.nothing, rows.dtype)), 0)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        # Not `base_weight()`, which casts the whole table.
        change = self.change(getattr(self.site.layer, self.site.weight_name))
        if self.site.kind == "embedding":
            return ops.add(y, self.op(ops.gather(self.places, x, 0), change))
        return ops.add(y, ops.gather(self.op(self.cast(x), change), self.places, -1))

    def delta_weight(self) -> Tensor:
        # bfloat16 has no gather on CPU.
        return ops.gather(self.change(self.base_weight()), self.places, 0)

    def snapshot(self) -> dict[str, np.ndarray]:
        # Once the rows are merged, the base weight no longer tells what they gained on.
        return super().snapshot() | {_TABLE: as_float32(to_numpy(self.site.weight)[self.place[0]])}

    def restore(self, values: Mapping[str, np.ndarray]) -> None:
        super().restore({attribute: value for attribute, value in values.items() if attribute != _TABLE})

    def delta_of(self, values: Mapping[str, np.ndarray]) -> Tensor:
        delta = np.zeros(self.site.shape, np.float32)
        delta[self.place[0]] = as_float32(values["delta"]) - values[_TABLE]
        return Tensor(delta)

    def meet(self, others: Mapping[str, Patch]) -> None:
        # What another merged into these rows is not what they gain on.
        mine = {*self.place[0]}
        self.reads_base = any(
            not isinstance(other, TokensPatch) or mine & {*other.place[0]} for other in others.values()
        )


class TiedTokensPatch(TokensPatch):
    """The same rows in a layer whose weight is tied to that of another, where they are trained and saved."""

    rides = True

    def __init__(self, site: Site, config: PeftConfig, autocast: bool, source: TokensPatch) -> None:
        self.source = Reference(source)
        super().__init__(site, config, autocast, *source.place)

    def setup(self, site: Site, config: Any) -> None:
        self._remember()

    def rows(self) -> Tensor:
        return self.source.cell.delta


class TrainableTokensPatch(TokensPatch):
    """W'[i] = w_i for the named rows i of a table or of a layer that gives scores of tokens; the others stay."""

    def __init__(
        self, site: Site, config: TrainableTokensConfig, autocast: bool = True, low_cpu_mem_usage: bool = False
    ) -> None:
        super().__init__(site, config, autocast, config.token_indices)

    def setup(self, site: Site, config: TrainableTokensConfig) -> None:
        super().setup(site, config)
        if not config.init_weights:
            write(self.delta, np.random.standard_normal(self.delta.shape).astype(np.float32))


class TrainableTokensTiedPatch(TiedTokensPatch):
    """The rows of a tied head: in HF's files they stand under its name, too."""

    def setup(self, site: Site, config: Any) -> None:
        super().setup(site, config)
        self.keys = {"delta": DELTA}

    @property
    def delta(self) -> Parameter:
        """The table's."""
        return self.source.cell.delta


def _checked(indices: Sequence[int], site: Site) -> list[int]:
    rows = site.shape[0]
    if site.transposed:
        raise ConfigError(f"Trainable tokens cannot be applied to {site.path}: its rows are inputs, and no tokens.")
    if not isinstance(indices, list | tuple) or not all(type(i) is int for i in indices):
        raise ConfigError(f"trainable tokens for {site.path} must be a list of int, got {indices!r}")
    wrong = [i for i in indices if not 0 <= i < rows]
    if wrong or not len(indices) or len({*indices}) < len(indices):
        what = f"{wrong} are none of its {rows} rows" if wrong else "it names no row, or one twice"
        raise ConfigError(f"Trainable tokens {list(indices)} for {site.path}: {what}.")
    return list(indices)


def _table(config: TrainableTokensConfig, model: nn.Cell, sites: Mapping[str, Site]) -> str | None:
    """The path of the input embedding."""
    table = input_table(model)
    layer = getattr(table and site_of(table, ""), "layer", None)
    named = [path for path in sites if path.rpartition(".")[2] == "embed_tokens"]
    return next((path for path, site in sites.items() if site.layer is layer), next(iter(named), None))


def _tied_head(
    model: nn.Cell,
    config: TrainableTokensConfig,
    cells: Mapping[str, nn.Cell],
    patches: Mapping[str, Patch],
    tied: Tied | None,
    autocast: bool,
    low_cpu_mem_usage: bool,
) -> dict[str, Patch]:
    """A head that shares the table's weight has its new rows."""
    source = patches.get(tied.table.path) if tied is not None else None
    if tied is None or not isinstance(source, TokensPatch):
        return {}
    return {tied.head.path: TrainableTokensTiedPatch(tied.head, config, autocast, source)}


class TrainableTokensModel(Tuner):
    """The base model with trainable tokens in it, and the switches over them."""


METHOD = Method(
    config=TrainableTokensConfig,
    tuner=TrainableTokensModel,
    patches=dict.fromkeys(("embedding", "dense"), TrainableTokensPatch),
    find_targets=_table,
    extras=_tied_head,
)
