"""The schedule of AdaLoRA, driven by `mindspore.train.Model`."""

from typing import Any

from mindspore.train import Callback

from msft_peft.backend.graphs import drop_compiled
from msft_peft.core.tuner import Tuner
from msft_peft.errors import ConfigError
from msft_peft.tuners.adalora.model import AdaLoraModel, KeepsGradients


class AdaLoraCallback(Callback):
    """Calls `update_and_allocate` after every step of `mindspore.train.Model.train`, so that nobody forgets it.

    `Model(net, optimizer=...).train(epochs, data, callbacks=[AdaLoraCallback(peft_model)], dataset_sink_mode=False)`

    Steps are counted from 1 as MindSpore does; `total_step` of the config is the number of all of them.

    Args:
        model: the `PeftModel`.

    Raises:
        ConfigError: no AdaLoRA model; when training begins, a network without an optimizer to get the gradients from,
            or several steps in one call (`dataset_sink_mode`).
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        tuner = getattr(model, "base_model", model)
        if not isinstance(tuner, AdaLoraModel):
            kind = type(tuner if isinstance(tuner, Tuner) else model).__name__
            raise ConfigError(f"AdaLoraCallback is for a PeftModel with an AdaLoRA adapter, got {kind}")
        self.tuner = tuner

    def on_train_begin(self, run_context: Any) -> None:
        """Have the optimizer keep its gradients."""
        seen = run_context.original_args()
        if seen.get("dataset_sink_mode"):
            raise ConfigError("AdaLoRA prunes between steps: train with dataset_sink_mode=False.")
        network = seen.train_network
        if not hasattr(network, "optimizer"):
            raise ConfigError(
                f"AdaLoraCallback finds no optimizer in {type(network).__name__}: write the step yourself, and call "
                "base_model.update_and_allocate(step, gradients) after it."
            )
        own = network.optimizer
        # A training that broke off never gave it back.
        while isinstance(own, KeepsGradients):
            own = own.optimizer
        self.network, self.own = network, own
        network.optimizer = self.tuner.keeps_gradients(own)
        drop_compiled()  # the step of an earlier training holds the optimizer of then

    def on_train_step_end(self, run_context: Any) -> None:
        """A step of the schedule."""
        self.tuner.update_and_allocate(run_context.original_args().cur_step_num)

    def on_train_end(self, run_context: Any) -> None:
        """Give the optimizer back."""
        self.network.optimizer = self.own
        drop_compiled()
