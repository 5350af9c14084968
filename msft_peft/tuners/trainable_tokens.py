"""Trainable tokens: only some rows of an embedding are trained, and only those are saved."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from mindspore import Tensor, ops

from msft_peft.backend.arrays import as_float32, to_numpy
from msft_peft.config import PeftConfig
from msft_peft.core.patch import Patch, Reference
from msft_peft.errors import ConfigError
from msft_peft.hosts import Site

DELTA = "trainable_tokens_delta"


class TokensPatch(Patch):
    """New rows in the place of some rows of a weight: E'[i] = delta[k] where i = indices[k], else E[i].

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
        rows = as_float32(to_numpy(site.weight))[indices]
        self.delta = self.weight(key, rows.shape, rows, attribute="delta")
        self._remember(rows)

    def _remember(self, rows: np.ndarray) -> None:
        indices, _ = self.place
        # Each row's place among the new ones; one past the last, where a row of zeros stands, if it is none of them.
        places = np.full(self.site.shape[0], len(indices), np.int32)
        places[indices] = np.arange(len(indices))
        self.places, self.original = Tensor(places), Tensor(rows, self.dtype)
        self.nothing = Tensor(np.zeros((1, rows.shape[1])), self.dtype)

    def rows(self) -> Tensor:
        """(len(indices), dim): the new rows."""
        return self.delta

    def change(self) -> Tensor:
        """(len(indices) + 1, dim): what the rows gain; the last one stands for all others."""
        rows = self.rows()
        # `cast_adapter_dtype` may have given the rows another dtype than they had at first.
        gained = ops.sub(rows, ops.cast(self.original, rows.dtype))
        return ops.concat((gained, ops.cast(self.nothing, rows.dtype)), 0)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        if self.site.kind == "embedding":
            return ops.add(y, ops.gather(self.change(), ops.gather(self.places, x, 0), 0))
        return ops.add(y, ops.gather(self.op(self.cast(x), self.change()), self.places, -1))

    def delta_weight(self) -> Tensor:
        return ops.gather(self.change(), self.places, 0)


class TiedTokensPatch(TokensPatch):
    """The same rows in a layer whose weight is tied to that of another, where they are trained and saved."""

    rides = True

    def __init__(self, site: Site, config: PeftConfig, autocast: bool, source: TokensPatch) -> None:
        self.source = Reference(source)
        super().__init__(site, config, autocast, *source.place)

    def setup(self, site: Site, config: Any) -> None:
        self._remember(as_float32(to_numpy(site.weight))[self.place[0]])

    def rows(self) -> Tensor:
        return self.source.cell.delta


def _checked(indices: Sequence[int], site: Site) -> list[int]:
    rows = site.shape[0]
    if not isinstance(indices, list | tuple) or not all(type(i) is int for i in indices):
        raise ConfigError(f"trainable_token_indices for {site.path} must be a list of int, got {indices!r}")
    wrong = [i for i in indices if not 0 <= i < rows]
    if wrong or not len(indices) or len({*indices}) < len(indices):
        what = f"{wrong} are none of its {rows} rows" if wrong else "it names no row, or one twice"
        raise ConfigError(f"trainable_token_indices={list(indices)} for {site.path}: {what}.")
    return list(indices)
