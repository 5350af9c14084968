"""Tuner: the base model with its adapters, and every switch over them. HF's `LoraModel` and its forty siblings."""

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mindspore import Tensor, nn
from tqdm import tqdm

from msft_peft.backend import arguments
from msft_peft.backend.graphs import drop_compiled
from msft_peft.backend.tree import inherit_mode, owners, replace_cells
from msft_peft.config import PeftConfig
from msft_peft.core import inject, switch
from msft_peft.core.adapter import active_of, configs_of
from msft_peft.core.checkpointing import is_checkpointing, set_checkpointing
from msft_peft.core.layer import TunerLayer
from msft_peft.core.patch import Patch
from msft_peft.core.prompt import prompts_of
from msft_peft.core.routing import Routing, invocations, routing_of
from msft_peft.core.wrapper import ModulesToSaveWrapper, Wrapper, wrappers
from msft_peft.errors import ConfigError, MergeError, PeftWarning
from msft_peft.hosts import as_cell, original
from msft_peft.registry import method_of


class Tuner(nn.Cell):
    """The base model, changed in place, and the switches over all adapters in it.

    Every switch is seen by compiled code too: it ends by dropping the process's compiled graphs, so that the next call
    of the model, of a `ms.jit` step around it or of `Model.train` compiles anew.

    Args:
        model: the base model; changed in place.
        peft_config: what to put in, active and trainable; None for a model that has its adapters already. In
            HF's `{name: config}` the one of `adapter_name` counts.
        adapter_name: the adapter's name.
        low_cpu_mem_usage, state_dict: see `inject_adapter_in_model`.

    Attributes:
        model: the base model.

    Raises:
        ConfigError: a config of another method than the class is for. For the rest see `inject_adapter_in_model`.
    """

    def __init__(
        self,
        model: nn.Cell,
        peft_config: PeftConfig | Mapping[str, PeftConfig] | None = None,
        adapter_name: str = "default",
        low_cpu_mem_usage: bool = False,
        state_dict: dict | None = None,
    ) -> None:
        cell = as_cell(model)
        if peft_config is not None:
            config: Any = peft_config.get(adapter_name) if isinstance(peft_config, Mapping) else peft_config
            self._check_config(config)
            inject.inject_adapter_in_model(config, cell, adapter_name, low_cpu_mem_usage, state_dict)
        super().__init__()
        self.model = cell
        inherit_mode(self, cell)
        if peft_config is not None:
            inject.settle(self)

    def _check_config(self, config: Any) -> None:
        wanted = method_of(config).tuner or Tuner
        if not isinstance(self, wanted):
            raise ConfigError(f"{type(self).__name__} is not for {config.peft_type} adapters: take {wanted.__name__}")

    def construct(self, *args: Any, **kwargs: Any) -> Any:
        invocation = self.routing.invocation
        if invocation is None or self.routing.names:
            return self.model(*args, **kwargs)
        if args:
            return self.model(self._invoked(args[0], invocation), *args[1:], **kwargs)
        if "input_ids" not in kwargs:
            raise ValueError("an adapter with alora_invocation_tokens looks for them in input_ids: pass those")
        kwargs["input_ids"] = self._invoked(kwargs["input_ids"], invocation)
        return self.model(**kwargs)

    def check_arguments(self, kwargs: Mapping[str, Any]) -> None:
        """Raise ValueError if what a call says to the adapters, and not to the base model, makes no sense."""

    def noted(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Note what the arguments of `generate` say to the adapters; returns those that are the base model's.

        Where there is nothing to note, that is `kwargs` itself.
        """
        return kwargs

    def _invoked(self, ids: Tensor, tokens: tuple[int, ...]) -> Tensor:
        return self.routing.start(invocations(ids, tokens), ids)

    def __getattr__(self, name: str) -> Any:
        """What is not the tuner's own is the base model's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            model = self.__dict__.get("_cells", {}).get("model")
            if model is None:
                raise
            return getattr(model, name)

    @property
    def routing(self) -> Routing:
        """What the wrappers now in the model share; others, put in after an `unload`, share another one."""
        return routing_of(self.model)

    # --- which adapters there are -------------------------------------------------------------------------------

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """The adapters' configs by name."""
        return configs_of(self.model)

    @property
    def active_adapters(self) -> list[str]:
        """The names of the adapters in use (or that would be, were they not disabled)."""
        return active_of(self.model)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `convert_to_lora` can convert the adapter: it has layers, and on each it only adds to the weight."""
        name = arguments.adapter_name(adapter_name)
        layers = [layer for layer in switch.layers_of(self.model) if name in layer.held()]
        return bool(layers) and all(layer.supports_lora_conversion(adapter_name) for layer in layers)

    # --- switches -----------------------------------------------------------------------------------------------

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter, or several together, the active ones.

        Args:
            adapter_name: a name or a list of names. Several act in the order given, each on the layer's output so far.
            inference_mode: leave them frozen. Otherwise they are trainable and all others frozen; one whose weights
                cannot be trained as they are stays frozen, with a warning.

        Raises:
            AdapterNameError: a name is not there.
            MergeError: two of them train the same layer whole (`modules_to_save`).
            ConfigError: two of them wait for different invocation tokens.
        """
        switch.set_adapter(self.model, adapter_name, inference_mode)

    def set_requires_grad(self, adapter_names: str | list[str], requires_grad: bool = True) -> None:
        """Freeze or unfreeze adapters, active or not. Build the optimizer and the gradient function afterwards.

        Raises:
            AdapterNameError: a name is not there, or the list is empty.
            ConfigError: weights that cannot be trained as they are.
        """
        switch.set_requires_grad(self.model, adapter_names, requires_grad)

    def enable_adapter_layers(self) -> None:
        """Switch all adapters on again."""
        self._set_enabled(dict.fromkeys(self._paths(), True))

    def disable_adapter_layers(self) -> None:
        """Switch all adapters off: the model acts as its base, apart from biases that were trained in place.

        Differs: HF also changes `requires_grad`, and leaves a frozen adapter trainable when it is enabled again.
        """
        self._warn_of_biases()
        if any(layer.merged for layer in switch.layers_of(self.model)):
            self.unmerge_adapter()
        self._set_enabled(dict.fromkeys(self._paths(), False))

    @contextlib.contextmanager
    def _disabled(self) -> Iterator[None]:
        """All adapters off inside the block; each layer's own state is restored after it, also after an exception."""
        before = {path: wrapper.enabled for path, wrapper in wrappers(self.model)}
        self.disable_adapter_layers()
        try:
            yield
        finally:
            # Layers that were adapted inside the block are as those that were there before.
            self._set_enabled(dict.fromkeys(self._paths(), all(before.values())) | before)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter and its weights. If it was active alone, the first of the others becomes active.

        Raises:
            AdapterNameError: it is not there ("Adapter x does not exist").
            MergeError: it is merged into the base weights.
        """
        switch.delete_adapter(self.model, adapter_name)

    # --- memory ----------------------------------------------------------------------------------------------

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None, blocks: str | Sequence[str] | None = None
    ) -> None:
        """Compute the blocks' activations again in the backward pass instead of keeping them: less memory, more time.

        Raises: see `core.checkpointing.set_checkpointing`.
        """
        set_checkpointing(self.model, True, blocks, gradient_checkpointing_kwargs)

    def gradient_checkpointing_disable(self, blocks: str | Sequence[str] | None = None) -> None:
        """Keep the blocks' activations again."""
        set_checkpointing(self.model, False, blocks)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether any Cell of the model is recomputed."""
        return is_checkpointing(self.model)

    # --- merging ------------------------------------------------------------------------------------------------

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Fold adapters into the base weights in place; `unmerge_adapter` undoes it. They stay, for later.

        Args:
            adapter_names: which; the active ones by default. Those that are merged already are passed over.
            safe_merge: compute first, and refuse with nothing written if a NaN or an infinity would be.

        Raises:
            AdapterNameError: a name is not there, or the list is empty.
            MergeError: the method or a layer cannot merge, a weight is tied to another layer's, the adapters are
                disabled, or `safe_merge` met a non-finite number.
        """
        names = self.active_adapters if adapter_names is None else switch.require_some(self.model, adapter_names)
        plan = [(layer, self._to_merge(layer, names)) for layer in switch.layers_of(self.model)]
        already = sorted({name for layer, _ in plan for name in layer.merged_adapters})
        if already and not any(new for _, new in plan):
            warnings.warn("All adapters are already merged, nothing to do.", PeftWarning, stacklevel=2)
            return
        self._check_merge(plan, safe_merge)
        if already:
            fresh = sorted({name for _, new in plan for name in new})
            warnings.warn(
                f"Already following adapters were merged {','.join(already)}. You are now additionally merging "
                f"{','.join(fresh)}.",
                PeftWarning,
                stacklevel=2,
            )
        for layer, new in plan:
            layer.merge(new)
        drop_compiled()

    def unmerge_adapter(self) -> None:
        """Take merged adapters out of the base weights again: to the bit, or within one rounding in float32."""
        switch.unmerge(self.model)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Cell:
        """Fold adapters into the base weights for good, and return the base model with its own layers.

        Layers that the active adapter trained whole are replaced by its copies.

        Args:
            progressbar: show one.
            safe_merge: see `merge_adapter`.
            adapter_names: see `merge_adapter`.

        Raises: as `merge_adapter`.
        """
        names = self.active_adapters if adapter_names is None else switch.require_some(self.model, adapter_names)
        plan = [(layer, self._to_merge(layer, names)) for layer in switch.layers_of(self.model)]
        self._check_merge(plan, safe_merge)
        for layer, new in tqdm(plan, desc="Merging", disable=not progressbar):
            layer.merge_for_good(new)
        for _, wrapper in wrappers(self.model):
            copies = [name for name in names if name in wrapper.held()]
            if isinstance(wrapper, ModulesToSaveWrapper) and copies:
                replace_cells(self.model, {id(wrapper): wrapper.held()[copies[0]]})
        inject.detach_all(self.model)
        return original(self.model)

    def unload(self) -> nn.Cell:
        """Take all adapters out and return the base model with its own layers, as it was.

        Differs: HF leaves the trained copies of `modules_to_save` in the model.
        """
        for layer in switch.layers_of(self.model):
            if layer.merged:
                layer.unmerge()
        inject.detach_all(self.model)
        return original(self.model)

    # ------------------------------------------------------------------------------------------------------------

    def _paths(self) -> list[str]:
        return [path for path, _ in wrappers(self.model)]

    def _set_enabled(self, states: Mapping[str, bool]) -> None:
        for path, wrapper in wrappers(self.model):
            wrapper.enable_adapters(states.get(path, wrapper.enabled))
        inject.wait(self.model)
        drop_compiled()

    @staticmethod
    def _to_merge(layer: TunerLayer, names: list[str]) -> list[str]:
        return [name for name in names if name in layer.held() and name not in layer.merged_adapters]

    def _check_merge(self, plan: list[tuple[TunerLayer, list[str]]], finite: bool) -> None:
        if not all(wrapper.enabled for _, wrapper in wrappers(self.model)):
            raise MergeError("The adapters are disabled: merging them would put them into effect. Enable them first.")
        for name in {name for _, new in plan for name in new}:
            method = method_of(self.peft_config[name])
            if not method.merges:
                raise MergeError(f"{method.name} adapters cannot be merged into the base weights: {name!r} is one.")
        holders, here = owners(self.model), dict(wrappers(self.model))
        for layer, new in plan:
            tied = holders[id(layer.weight)]
            sharing = [here.get(path.removesuffix(".base_layer")) for path in tied]
            if len(tied) > 1 and not all(_knows_of_the_tie(sharing, name) for name in new):
                raise MergeError(
                    f"The weight of {layer.site.path} is tied: {' and '.join(tied)} hold the same Parameter, and "
                    "merging an adapter of one would change the other too. Give one a copy first, or do not merge."
                )
            layer.check_merge(new, finite)

    def _warn_of_biases(self) -> None:
        for config in self.peft_config.values():
            bias = getattr(config, "bias", "none")
            if bias != "none":
                warnings.warn(
                    f"Careful, disabling adapter layers with bias configured to be '{bias}' does not produce the same "
                    "output as the base model would without adaption.",
                    PeftWarning,
                    stacklevel=4,
                )


def _knows_of_the_tie(holders: list[Wrapper | None], name: str) -> bool:
    """Whether all layers that share a weight have a Patch of the adapter, of which one merges for the others."""
    patches = [w.held().get(name) if isinstance(w, TunerLayer) else None for w in holders]
    known = [patch for patch in patches if isinstance(patch, Patch)]
    return len(known) == len(patches) and sum(not patch.rides for patch in known) == 1


def base_of(model: nn.Cell) -> nn.Cell:
    """The Cell that holds the adapters: the base model inside a `PeftModel` or a `Tuner`, or else `model` itself.

    Raises:
        TypeError: it is no Cell, and none can stand for it.
    """
    try:
        model = as_cell(model)
    except ConfigError as error:
        raise TypeError(f"a model is a mindspore.nn.Cell, got {type(model).__name__}") from error
    inner = getattr(model, "base_model", None)
    if isinstance(inner, nn.Cell) and prompts_of(inner) is not None:
        return inner
    tuner = inner if isinstance(inner, Tuner) else model
    return tuner.model if isinstance(tuner, Tuner) else tuner
