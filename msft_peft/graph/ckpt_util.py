"""Checkpoints of what is trained, and of nothing else."""

import copy
import os
from collections.abc import Iterator
from typing import Any

from mindspore import Parameter, nn
from mindspore.train import CheckpointConfig, ModelCheckpoint

from msft_peft.graph.exceptions import AbsolutePathError, FreezeArgumentError, FreezeTypeError, LinkPathError


class Trainable(nn.Cell):
    """What `save_checkpoint` sees in the place of a network: its trainable parameters alone.

    Attributes:
        network: the network, once it is known; in a tuple, so that it is no child of this Cell.
        layouts: how its parameters are split over devices.
    """

    def __init__(self) -> None:
        super().__init__(auto_prefix=False)
        self.network: tuple[nn.Cell, ...] = ()
        self.layouts: Any = {}

    def parameters_and_names(self, name_prefix: str = "", expand: bool = True) -> Iterator[tuple[str, Parameter]]:
        for network in self.network:
            yield from ((p.name, p) for p in network.trainable_params())

    @property
    def parameter_layout_dict(self) -> Any:
        """The layouts of the network that is trained: without them, slices would be taken for whole parameters."""
        return self.layouts


class _Config(CheckpointConfig):
    """A CheckpointConfig whose network is a `Trainable`."""

    view: Trainable

    @property
    def saved_network(self) -> Trainable:
        return self.view


class TrainableParamsCheckPoint(ModelCheckpoint):
    """A `ModelCheckpoint` that saves the trainable parameters alone, without the optimizer's state.

    Load such a file after that of the whole network: `mindspore.load_param_into_net` fills in what it holds.

    Args:
        directory: where to; an absolute path. It is made if it is not there.
        prefix: of the file names, `{prefix}-{epoch}_{step}.ckpt`.
        config: a `mindspore.train.CheckpointConfig`; its `saved_network` says whose parameters are meant, if not those
            of the network that is trained.

    Raises:
        FreezeArgumentError (ValueError): no directory; or, when training begins, a network without trainable
            parameters.
        FreezeTypeError (TypeError): the directory is no string.
        LinkPathError: it is a link.
        AbsolutePathError: it is no absolute path.
        ValueError, TypeError: prefix or config, as of `ModelCheckpoint`.
    """

    def __init__(self, directory: str, prefix: str = "DELTA_CKP", config: CheckpointConfig | None = None) -> None:
        if directory is None or directory == "":
            raise FreezeArgumentError("TrainableParamsCheckPoint: `directory` is required.")
        if not isinstance(directory, str):
            raise FreezeTypeError(f"TrainableParamsCheckPoint: directory must be a string, got {directory!r}")
        if os.path.islink(directory.rstrip(os.sep)):
            raise LinkPathError(f"TrainableParamsCheckPoint: {directory} is a link; name the directory itself.")
        if not os.path.isabs(directory):
            raise AbsolutePathError(f"TrainableParamsCheckPoint: {directory} is not an absolute path.")
        self._chosen = getattr(config, "saved_network", None)
        self._view = Trainable()
        super().__init__(prefix, directory, _narrowed(config or CheckpointConfig(), self._view))

    def begin(self, run_context: Any) -> None:
        """Take note of the network that is trained; MindSpore calls this."""
        super().begin(run_context)
        run = run_context.original_args()
        network = self._chosen or run.network or run.train_network
        if not network.trainable_params():
            raise FreezeArgumentError(
                f"TrainableParamsCheckPoint: {type(network).__name__} has no trainable parameters: nothing would "
                "be saved."
            )
        self._view.network, self._view.layouts = (network,), run.train_network.parameter_layout_dict


def _narrowed(config: Any, view: Trainable) -> Any:
    """The same config for the view; what is none is left for `ModelCheckpoint` to refuse."""
    if not isinstance(config, CheckpointConfig):
        return config
    narrowed = copy.copy(config)
    narrowed.__class__ = _Config
    narrowed.view = view
    return narrowed
