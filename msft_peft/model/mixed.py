"""PeftMixedModel: adapters of different methods in one model, active together."""

import os
from collections.abc import Iterable
from typing import Any, NoReturn

from mindspore import nn

from msft_peft.backend import arguments
from msft_peft.config import PeftConfig
from msft_peft.core import switch
from msft_peft.core.adapter import Adapter
from msft_peft.errors import AdapterNameError, ConfigError
from msft_peft.model.peft_model import PeftModel
from msft_peft.registry import METHODS, method_of


class PeftMixedModel(PeftModel):
    """A model with adapters of different methods, to be loaded and used together: `get_peft_model(..., mixed=True)`.

    Only methods that say so (`Method.mixed`) can be mixed. Several active adapters act on a layer in the order given.
    The adapters are trained and saved elsewhere, each in a `PeftModel` of its own, and loaded here.

    Args and errors: as `PeftModel`; a method that cannot be mixed is a ConfigError.

    Differs: HF's is no `PeftModel`, and needs one layer inside another for each method.
    """

    def _prepare(self, model: nn.Cell, config: PeftConfig, *options: Any) -> Adapter:
        if not method_of(config).mixed:
            compatible = sorted(name for name, method in METHODS.items() if method.mixed)
            raise ConfigError(
                f"The provided `peft_type` '{config.peft_type}' is not compatible with the `PeftMixedModel`. "
                f"Compatible types are: {compatible}"
            )
        return super()._prepare(model, config, *options)

    def _check_method(self, config: PeftConfig) -> None:
        """Nothing: any method that can be mixed goes with any other; `_prepare` checks that it can."""

    def _names(self, names: str | Iterable[str]) -> list[str]:
        """The names as a list.

        Raises:
            AdapterNameError: one of them is not there.
        """
        names = arguments.adapter_names(names)
        unknown = sorted(name for name in names if name not in self.peft_config)
        if unknown:
            raise AdapterNameError(f"Adapter(s) {unknown} not found, available adapters: {sorted(self.peft_config)}")
        return names

    @property
    def active_adapter(self) -> list[str]:  # type: ignore[override]
        """The adapters in use: a list, as in HF, since there may be several."""
        return self.active_adapters

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter, or several of any methods together, the active ones.

        Args:
            adapter_name: a name or a list of names. Several act in the order given, each on the layer's output so far.
            inference_mode: leave them frozen. Otherwise they are trainable and all others frozen.

        Raises:
            AdapterNameError: a name is not there.
            MergeError: two of them train the same layer whole (`modules_to_save`).
        """
        self.base_model.set_adapter(self._names(adapter_name), inference_mode)

    def delete_adapter(self, adapter_name: str | list[str]) -> None:
        """Remove one adapter, or several; see `Tuner.delete_adapter`.

        Raises:
            AdapterNameError: a name is not there; then none is removed.
            MergeError: one of them is merged; then none is removed.
        """
        names = self._names(adapter_name)
        switch.check_not_merged(self.get_base_model(), names)
        for name in names:
            self.base_model.delete_adapter(name)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise NotImplementedError: as in HF, mixed adapters are saved from models of their own."""
        raise NotImplementedError(
            "Saving is not supported for PeftMixedModel (yet). Save each adapter from a PeftModel of its own."
        )

    def push_to_hub(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise NotImplementedError, as `save_pretrained`."""
        self.save_pretrained("")

    def create_or_update_model_card(self, output_dir: str | os.PathLike, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise NotImplementedError, as in HF."""
        raise NotImplementedError("Model card creation is not supported for PeftMixedModel (yet).")

    def get_layer_status(self) -> NoReturn:
        """Raise TypeError, as in HF."""
        raise TypeError("get_layer_status is not supported for PeftMixedModel.")

    def get_model_status(self) -> NoReturn:
        """Raise TypeError, as in HF."""
        raise TypeError("get_model_status is not supported for PeftMixedModel.")
