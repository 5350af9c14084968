"""Tuner: the base model with its adapters, and every switch over them. HF's `LoraModel` and its forty siblings."""

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mindspore import Tensor, nn
from tqdm import tqdm

from msft_peft.backend.graphs import drop_compiled
from msft_peft.backend.tree import inherit_mode, owners, replace_cells
from msft_peft.config import PeftConfig
from msft_peft.core import inject
from msft_peft.core.layer import ModulesToSaveWrapper, TunerLayer, Wrapper, wrappers
from msft_peft.core.patch import Patch
from msft_peft.core.routing import invocations, routing_of
from msft_peft.errors import AdapterNameError, ConfigError, MergeError, PeftWarning
from msft_peft.registry import method_of


class Tuner(nn.Cell):
    """The base model, changed in place, and the switches over all adapters in it.

    Every switch is seen by compiled code too: it ends by dropping the process's compiled graphs, so that the next call
    of the model, of a `ms.jit` step around it or of `Model.train` compiles anew.

    Attributes:
        model: the base model.
    """

    def __init__(self, model: nn.Cell) -> None:
        super().__init__()
        self.model = model
        self._active: tuple[str, ...] = ()
        self.routing = routing_of(model)
        inherit_mode(self, model)

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

    # --- which adapters there are -------------------------------------------------------------------------------

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """The adapters' configs by name."""
        return inject.configs_of(self.model)

    @property
    def active_adapters(self) -> list[str]:
        """The names of the adapters in use (or that would be, were they not disabled)."""
        return [name for name in self._active if name in self.peft_config]

    def _layers(self) -> list[TunerLayer]:
        """Every adapted layer, in network order."""
        return [wrapper for _, wrapper in wrappers(self.model) if isinstance(wrapper, TunerLayer)]

    def _require(self, names: str | Iterable[str]) -> list[str]:
        """The names as a list.

        Raises:
            AdapterNameError: one of them is not there.
        """
        names = [names] if isinstance(names, str) else list(names)
        missing = [name for name in names if name not in self.peft_config]
        if missing:
            raise AdapterNameError(f"Adapter {', '.join(missing)} not found. There are {sorted(self.peft_config)}.")
        return names

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `convert_to_lora` can convert the adapter: it has layers, and on each it only adds to the weight."""
        layers = [layer for layer in self._layers() if adapter_name in layer.held()]
        return bool(layers) and all(layer.supports_lora_conversion(adapter_name) for layer in layers)

    # --- switches -----------------------------------------------------------------------------------------------

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter, or several together, the active ones.

        Args:
            adapter_name: a name or a list of names. Several act in the order given, each on the layer's output so far.
            inference_mode: leave them frozen. Otherwise they are trainable and all others frozen.

        Raises:
            AdapterNameError: a name is not there.
            MergeError: two of them train the same layer whole (`modules_to_save`).
            ConfigError: two of them wait for different invocation tokens.
        """
        names = list(dict.fromkeys(self._require(adapter_name)))
        self._check_one_copy(names)
        waiting = inject.invocations_of(self.model, names)
        if len(waiting) > 1:
            raise ConfigError(
                f"Adapters {names} cannot be active together: they wait for different tokens, {waiting}."
            )
        self._unmerge_first("Adapter cannot be set when the model is merged.")
        inject.activate(self.model, names, trainable=not inference_mode)
        self._active = tuple(names)
        drop_compiled()

    def _unmerge_first(self, why: str) -> None:
        """Unmerge, with a warning that says why, if anything is merged."""
        if any(layer.merged for layer in self._layers()):
            warnings.warn(f"{why} Unmerging the model first.", PeftWarning, stacklevel=3)
            self.unmerge_adapter()

    def set_requires_grad(self, adapter_names: str | list[str], requires_grad: bool = True) -> None:
        """Freeze or unfreeze adapters, active or not. Build the optimizer and the gradient function afterwards."""
        names = self._require(adapter_names)
        for _, wrapper in wrappers(self.model):
            wrapper.set_requires_grad(names, requires_grad)
        for name in names:
            for bias in inject.adapter_in(self.model, name).biases(self.model).values():
                bias.parameter.requires_grad = requires_grad
        drop_compiled()

    def enable_adapter_layers(self) -> None:
        """Switch all adapters on again."""
        self._set_enabled(dict.fromkeys(self._paths(), True))

    def disable_adapter_layers(self) -> None:
        """Switch all adapters off: the model acts as its base, apart from biases that were trained in place.

        Differs: HF also changes `requires_grad`, and leaves a frozen adapter trainable when it is enabled again.
        """
        self._warn_of_biases()
        if any(layer.merged for layer in self._layers()):
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
            self._set_enabled(before)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter and its weights. If it was active alone, the first of the others becomes active.

        Raises:
            AdapterNameError: it is not there ("Adapter x does not exist").
            MergeError: it is merged into the base weights.
        """
        if adapter_name not in self.peft_config:
            raise AdapterNameError(f"Adapter {adapter_name} does not exist. There are {sorted(self.peft_config)}.")
        if any(adapter_name in layer.merged_adapters for layer in self._layers()):
            raise MergeError(
                f"Cannot delete adapter(s) ['{adapter_name}'] while they are merged. Please unmerge them first."
            )
        was_active = adapter_name in self._active
        inject.discard(self.model, adapter_name)
        self._active = tuple(name for name in self._active if name != adapter_name)
        if was_active and not self._active and self.peft_config:
            heir = min(self.peft_config)
            warnings.warn(
                f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to {heir}.",
                PeftWarning,
                stacklevel=2,
            )
            self.set_adapter(heir, inference_mode=self.peft_config[heir].inference_mode)
        drop_compiled()

    # --- merging ------------------------------------------------------------------------------------------------

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Fold adapters into the base weights in place; `unmerge_adapter` undoes it. They stay, for later.

        Args:
            adapter_names: which; the active ones by default. Those that are merged already are passed over.
            safe_merge: compute first, and refuse with nothing written if a NaN or an infinity would be.

        Raises:
            AdapterNameError: a name is not there.
            MergeError: the method or a layer cannot merge, a weight is tied to another layer's, the adapters are
                disabled, or `safe_merge` met a non-finite number.
        """
        if not all(wrapper.enabled for _, wrapper in wrappers(self.model)):
            raise MergeError("The adapters are disabled: merging them would put them into effect. Enable them first.")
        names = self.active_adapters if adapter_names is None else self._require(adapter_names)
        plan = [(layer, self._to_merge(layer, names)) for layer in self._layers()]
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
        merged = [layer for layer in self._layers() if layer.merged]
        if not merged:
            warnings.warn("Already unmerged. Nothing to do.", PeftWarning, stacklevel=2)
        for layer in merged:
            layer.unmerge()
        drop_compiled()

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
        names = self.active_adapters if adapter_names is None else self._require(adapter_names)
        plan = [(layer, self._to_merge(layer, names)) for layer in self._layers()]
        self._check_merge(plan, safe_merge)
        for layer, new in tqdm(plan, desc="Merging", disable=not progressbar):
            layer.merge_for_good(new)
        for _, wrapper in wrappers(self.model):
            copies = [name for name in names if name in wrapper.held()]
            if isinstance(wrapper, ModulesToSaveWrapper) and copies:
                replace_cells(self.model, {id(wrapper): wrapper.held()[copies[0]]})
        inject.detach_all(self.model)
        return self.model

    def unload(self) -> nn.Cell:
        """Take all adapters out and return the base model with its own layers, as it was.

        Differs: HF leaves the trained copies of `modules_to_save` in the model.
        """
        for layer in self._layers():
            if layer.merged:
                layer.unmerge()
        inject.detach_all(self.model)
        return self.model

    # ------------------------------------------------------------------------------------------------------------

    def _paths(self) -> list[str]:
        return [path for path, _ in wrappers(self.model)]

    def _set_enabled(self, states: Mapping[str, bool]) -> None:
        for path, wrapper in wrappers(self.model):
            wrapper.enable_adapters(states.get(path, wrapper.enabled))
        drop_compiled()

    def _check_one_copy(self, names: list[str]) -> None:
        for path, wrapper in wrappers(self.model):
            both = [name for name in names if name in wrapper.held()]
            if isinstance(wrapper, ModulesToSaveWrapper) and len(both) > 1:
                raise MergeError(f"Adapters {both} cannot be active together: each trains its own copy of {path}.")

    @staticmethod
    def _to_merge(layer: TunerLayer, names: list[str]) -> list[str]:
        return [name for name in names if name in layer.held() and name not in layer.merged_adapters]

    def _check_merge(self, plan: list[tuple[TunerLayer, list[str]]], finite: bool) -> None:
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
