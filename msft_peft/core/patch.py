"""Patch: one adapter's weights and mathematics at one Site."""

from typing import Any

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import Initializer, initializer

from msft_peft.backend.arrays import FLOAT_DTYPES, HALF_DTYPES
from msft_peft.config import PeftConfig
from msft_peft.hosts import Site


class Patch(nn.Cell):
    """The delta Cell of one adapter at one Site. It knows no adapter names and does no bookkeeping.

    A method writes `setup` and, if it is additive, `delta_weight`; the other hooks have defaults that follow from it.

    Attributes:
        site: where it sits.
        op: how the layer there applies a weight.
        keys: attribute of each weight -> its key in HF's files, below the layer's path.
    """

    def __init__(self, site: Site, config: PeftConfig, autocast: bool = True) -> None:
        super().__init__()
        self.site, self.op = site, site.op
        self.keys: dict[str, str] = {}
        # Half-precision adapters lose small updates, so they are kept in float32 unless told otherwise.
        halves = HALF_DTYPES if autocast else ()
        self.dtype = ms.float32 if site.dtype in halves or site.dtype not in FLOAT_DTYPES else site.dtype
        self.setup(site, config)

    def setup(self, site: Site, config: Any) -> None:
        """Declare the weights, and keep what the formula needs of `config`."""
        raise NotImplementedError

    def weight(self, key: str, shape: tuple[int, ...], init: str | Initializer) -> Parameter:
        """A new trainable weight, under `key` in checkpoint files ("lora_A.weight")."""
        attribute = key.partition(".")[0]
        self.keys[attribute] = key
        return Parameter(initializer(init, shape, self.dtype), name=attribute)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: these weights stand in the tree, and in a `state_dict`, under the paths that HF gives them."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Nothing, see `_save_to_state_dict`."""

    def cast(self, x: Tensor) -> Tensor:
        """Give x the dtype of this Patch's weights."""
        return x if x.dtype == self.dtype else ops.cast(x, self.dtype)

    def delta_weight(self) -> Tensor:
        """What an additive method adds to the base weight, in torch's layout."""
        raise NotImplementedError

    def before(self, x: Tensor) -> Tensor:
        """What the base layer is given instead of x."""
        return x

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """What becomes of the base layer's output y for input x."""
        return y + self.op(x, self.delta_weight())

    def merged(self, w: Tensor) -> Tensor:
        """The base weight with this adapter folded in; w and the result in torch's layout and at least float32.

        Raises:
            MergeError: this one cannot be folded in.
        """
        return w + self.delta_weight()

    def check_mergeable(self) -> None:
        """Raise `MergeError` if this Patch cannot be merged where it sits."""
        return None
