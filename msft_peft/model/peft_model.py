"""PeftModel: what a user holds. HF's names over a Tuner, and the files."""

import contextlib
import copy
import functools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from mindspore import Tensor, nn

from msft_peft.backend import arguments
from msft_peft.backend.tree import inherit_mode
from msft_peft.config import PeftConfig, TaskType
from msft_peft.core import inject, switch
from msft_peft.core.adapter import Adapter, active_of, adapter_in, configs_of
from msft_peft.core.mixed_batch import divided
from msft_peft.core.prepare import prepare
from msft_peft.core.routing import invocations
from msft_peft.core.tuner import Tuner
from msft_peft.core.wrapper import buffers_in, wrappers
from msft_peft.errors import AdapterNameError, ConfigError
from msft_peft.hosts import as_cell, facade
from msft_peft.io.adapter import (
    read_tensors,
    resumable,
    unpacked,
    with_copies_in,
)
from msft_peft.io.load import LoadReport, check_rows, fit
from msft_peft.model.prompted import PromptSwitches
from msft_peft.model.saving import Saving
from msft_peft.model.status import TunerLayerStatus, TunerModelStatus, get_layer_status, get_model_status
from msft_peft.registry import method_of

# Methods of tuners that mean nothing to prompts, and what to do instead.
_MERGES = "so there is nothing to merge or to take out. get_base_model() is the model without them."
_SWITCHES = "so there are no layers to switch. `with model.disable_adapter():` runs the model without them."
_OF_LAYERS = {
    **dict.fromkeys(("merge_adapter", "unmerge_adapter", "merge_and_unload", "unload"), _MERGES),
    **dict.fromkeys(("enable_adapter_layers", "disable_adapter_layers"), _SWITCHES),
}


class PeftModel(Saving):
    """A base model with adapters in it: call, train, save and load it like the base model.

    The base model is changed in place: its targeted layers are wrapped, its own parameters frozen and not copied.
    Parameters are named as in HF peft (`base_model.model...q_proj.lora_A.default.weight`). Methods that are not found
    here are looked for in `base_model` (the `Tuner`: `merge_adapter`, `unmerge_adapter`, `merge_and_unload`, `unload`,
    `set_requires_grad`), then in the base model. Adapters of a prompt method stand before the input instead: there
    `base_model` is the base model itself, and `prompt_encoder` has what each adapter puts before it.

    Args:
        model: the base model.
        peft_config: what to put in.
        adapter_name: the adapter's name.
        autocast_adapter_dtype: keep adapter weights in float32 where the base is in half precision.
        low_cpu_mem_usage: draw no random weights, since they are about to be loaded; until then they are NaN.

    Attributes:
        load_report: what the last `from_pretrained` or `load_adapter` did, a `LoadReport`; None before the first.

    Raises:
        ConfigError, NoMatchingPeftModuleError, AdapterNameError, NotImplementedError: see `core.prepare`; the
            model is then as it was.
    """

    # The heads that the models of a task class have, which are trained whole.
    _heads: ClassVar[tuple[str, ...]] = ()

    load_report: LoadReport | None = None

    def __init__(
        self,
        model: nn.Cell,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        super().__init__()
        model = as_cell(model)
        adapter = self._prepare(model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
        self._install(model, adapter)

    @classmethod
    def _for_task(cls, config: PeftConfig) -> type["PeftModel"]:
        """The class whose task is the config's; this class itself where it has that task, or there is none."""
        if cls._task is not None and cls._task == config.task_type:
            return cls
        family = (cls if cls._task is None else PeftModel).__subclasses__()
        return next((sub for sub in family if sub._task is not None and sub._task == config.task_type), cls)

    def _prepare(
        self,
        model: nn.Cell,
        config: PeftConfig,
        name: str,
        autocast: bool,
        low_cpu_mem_usage: bool,
        fresh: bool = True,
    ) -> Adapter:
        """The adapter, still outside the model, with the heads of this task among what it trains whole.

        A config from a file says by itself which heads those are, where HF's class of its name could say nothing and
        HF trains none.
        """
        if isinstance(config, PeftConfig) and config.is_prompt_learning and self._task is None:
            raise ConfigError(
                f"{config.peft_type} needs a task_type, one of {[task.value for task in TaskType]}: it says what "
                "becomes of labels and masks."
            )
        asked = fresh or "modules_to_save" not in getattr(config, "beyond_hf", ())
        if isinstance(config, PeftConfig) and self._heads and asked and hasattr(config, "modules_to_save"):
            config = copy.deepcopy(config)
            config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or []), *self._heads]))
        return prepare(model, config, name, autocast, low_cpu_mem_usage)

    def _install(self, model: nn.Cell, adapter: Adapter) -> None:
        inject.attach(model, adapter)
        self.__class__ = facade(type(self), model)
        if adapter.prompt is None:
            self.base_model = (method_of(adapter.config).tuner or Tuner)(model)
        else:
            self._stand_before(model)
        inject.activate(model, [adapter.name], trainable=not adapter.config.inference_mode)
        inherit_mode(self, model)
        inject.settle(self)

    def __call__(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Run the model.

        Args:
            args, kwargs: what the base model takes.
            adapter_names: for each row of the batch the adapter that serves it, or "__base__". For inference, and not
                inside code that is being compiled.

        Raises: see `core.mixed_batch.divided`.

        Differs: HF's other methods than LoRA ignore `adapter_names`, silently.
        """
        if self.prompts is None:
            self.base_model.check_arguments(kwargs)
        if adapter_names is None:
            self._say_what_is_ignored(kwargs)
            return super().__call__(*args, **kwargs)
        self._check_divisible()
        with divided(self._roots(), adapter_names, _first_input(args, kwargs)):
            return super().__call__(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The base model's `generate`, with the active adapters in effect, or those that serve the rows."""
        if adapter_names is not None:
            self._check_divisible()
        if self.prompts is not None:
            return self._generate_prompted(args, kwargs)
        base, routing, given = self.get_base_model(), self.base_model.routing, kwargs
        kwargs = self.base_model.noted(given)
        if adapter_names is None and routing.invocation is None and kwargs is given:
            return base.generate(*args, **kwargs)
        x = _first_input(args, kwargs)
        with contextlib.ExitStack() as stack:
            if adapter_names is not None:
                stack.enter_context(divided(self._roots(), adapter_names, x))
            elif routing.invocation is not None:
                routing.start(invocations(Tensor(x), routing.invocation), Tensor(x))
            if hasattr(base, "on_repeat"):  # one of ours: it tells when several texts continue each prompt
                base.on_repeat = functools.partial(routing.repeat, len(x))
                stack.callback(setattr, base, "on_repeat", None)
            return base.generate(*args, **kwargs)

    def _check_divisible(self) -> None:
        if self.prompts is not None:
            raise ConfigError("adapter_names does not go with prompts: one of them stands before all rows of a batch.")

    def _roots(self) -> list[nn.Cell]:
        return [self, self.base_model, self.get_base_model()]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            tuner = self.__dict__.get("_cells", {}).get("base_model")
            if tuner is None:
                raise
            if self.__dict__.get("prompts") is None:
                return getattr(tuner, name)
            if name in _OF_LAYERS:
                raise AttributeError(
                    f"'{type(tuner).__name__}' object has no attribute '{name}': virtual tokens stand before the "
                    f"input, {_OF_LAYERS[name]}"
                ) from None
            return getattr(self._switches if hasattr(PromptSwitches, name) else tuner, name)

    # --- adapters -----------------------------------------------------------------------------------------------

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """The adapters' configs by name."""
        return configs_of(self.get_base_model())

    @property
    def active_adapters(self) -> list[str]:
        """The names of the adapters in use."""
        return active_of(self.get_base_model())

    @property
    def active_adapter(self) -> str | None:
        """The first adapter in use; None if there is none."""
        return next(iter(self.active_adapters), None)

    @property
    def active_peft_config(self) -> PeftConfig:
        """The config of `active_adapter`."""
        return self.peft_config[switch.require(self.get_base_model(), self.active_adapters)[0]]

    @property
    def peft_type(self) -> str | None:
        """The adapters' method, "LORA" for instance; None once all of them are gone."""
        return next((str(config.peft_type) for config in self.peft_config.values()), None)

    @property
    def base_model_torch_dtype(self) -> Any:
        """The base model's dtype, MindSpore's, under HF's name; None where the model does not tell."""
        return getattr(self.base_model, "dtype", None)

    def get_base_model(self) -> nn.Cell:
        """The base model, adapted layers still in it."""
        return self.base_model.model if self.prompts is None else self.base_model

    @property
    def _switches(self) -> Any:
        """What switches the adapters: the tuner, or what stands for it where there is none."""
        return self.base_model if self.prompts is None else PromptSwitches(self.base_model)

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add a fresh adapter, inactive and frozen; `set_adapter` puts it to use.

        Raises:
            AdapterNameError: the name is taken, or cannot be one.
            ConfigError: another method than that of the adapters in the model; for others see `core.prepare`.
        """
        if arguments.adapter_name(adapter_name) in self.peft_config:
            raise AdapterNameError(f"Adapter with name '{adapter_name}' already exists.")
        self._check_method(peft_config)
        base = self.get_base_model()
        inject.attach(base, self._prepare(base, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage))
        inject.settle(self)

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Make one adapter the active one, trainable unless `inference_mode`; all others are frozen.

        Raises:
            AdapterNameError: it is not there.
            TypeError: a list; several at once are switched on by `model.base_model.set_adapter([...])`, as in HF.
        """
        if not isinstance(adapter_name, str):
            raise TypeError(
                f"PeftModel.set_adapter takes one name, got {adapter_name!r}. For several adapters at once call "
                "model.base_model.set_adapter([...])."
            )
        self._switches.set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; see `Tuner.delete_adapter`."""
        self._switches.delete_adapter(adapter_name)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """All adapters off inside a `with` block: the outputs are the base model's. Compiled code is dropped twice."""
        with self._switches._disabled():
            yield

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """The state of every layer that adapters have something in; see the function of this name."""
        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        """The state of the adapters as a whole; see the function of this name."""
        return get_model_status(self)

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether an adapter is in use and not switched off.

        Differs: in HF, adapters that `disable_adapter_layers` switched off count as enabled.
        """
        layers = [wrapper for _, wrapper in wrappers(self.get_base_model())]
        if self.prompts is not None:
            return self.prompts.acting
        return any(layer.enabled and layer.active for layer in layers)

    @property
    def modules_to_save(self) -> set[str] | None:
        """The names in the adapters' `modules_to_save`; None if there are none."""
        names = [getattr(config, "modules_to_save", None) or [] for config in self.peft_config.values()]
        return {name for some in names for name in some} or None

    def set_requires_grad(self, adapter_names: str | list[str], requires_grad: bool = True) -> None:
        """Freeze or unfreeze adapters, active or not; see `Tuner.set_requires_grad`."""
        self._switches.set_requires_grad(adapter_names, requires_grad)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) parameters, counted in numbers; without buffers, as in HF."""
        kept = {
            id(p) for _, w in wrappers(self.get_base_model()) for held in w.held().values() for p in buffers_in(held)
        }
        sizes = [(math.prod(p.shape), p.requires_grad) for p in self.get_parameters() if id(p) not in kept]
        trained, total = sum(size for size, trainable in sizes if trainable), sum(size for size, _ in sizes)
        layers = switch.layers_of(self.get_base_model())
        return trained, total + sum(patch.constants for layer in layers for patch in layer.adapters._cells.values())

    def print_trainable_parameters(self) -> None:
        """Print HF's line: `trainable params: 160 || all params: 668 || trainable%: 23.9521`."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Cell,
        model_id: str | os.PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        *,
        strict: bool = True,
        ignore_mismatched_sizes: bool = False,
        **hub: Any,
    ) -> "PeftModel":
        """A base model with an adapter from a directory or Hub repository.

        Everything in the files is checked before the model is touched: after an error it is as it was.

        Args:
            model: the base model, changed in place.
            model_id: a directory, or a repository id.
            adapter_name: the adapter's name here, whatever it was called when it was saved.
            is_trainable: go on training it; otherwise it is frozen and the model set to evaluation.
            config: used instead of the file's.
            autocast_adapter_dtype: see `PeftModel`.
            ephemeral_gpu_offload: HF's, for layers on another device; must be False.
            low_cpu_mem_usage: draw no random weights before loading; whatever the file lacks is then an error.
            key_mapping: regex -> replacement, for files with other names: tried in turn on each key without its
                `base_model.model.`; the first that is found is applied.
            strict: a missing or unexpected tensor is an error; otherwise a warning.
            ignore_mismatched_sizes: warn of tensors of other shapes and leave them fresh; otherwise an error.
            hub: `subfolder`, and `revision`, `token`, `cache_dir`, ... for `huggingface_hub`.

        Raises:
            ConfigError: no config file, or a broken one.
            FileNotFoundError: no weights file.
            LoadError: broken weights, or ones that do not fit; all of them are listed.
            NoMatchingPeftModuleError: the model lacks the layers that the adapter is for.

        What was loaded is told by `load_report` of the result.

        Differs: HF warns of missing tensors, is silent about unexpected ones, and returns a model all the same.
        """
        _refuse_offload(ephemeral_gpu_offload)
        config = _config_for(model_id, config, is_trainable, hub)
        cls = cls._for_task(config)
        self = cls.__new__(cls)
        nn.Cell.__init__(self)
        model = as_cell(model)
        inject.say_the_second_time(model)
        tensors = unpacked(read_tensors(model_id, key_mapping=key_mapping, **hub), config)
        config = with_copies_in(tensors, config, model)
        # What stands before the input comes from the file or is an error.
        undrawn = low_cpu_mem_usage or config.is_prompt_learning
        adapter = self._prepare(model, config, adapter_name, autocast_adapter_dtype, undrawn, False)
        tensors, saved = resumable(tensors, adapter, model_id, **hub)
        fitted = fit(tensors, adapter, model)
        fitted.report.check(strict, ignore_mismatched_sizes, undrawn)
        check_rows(fitted, adapter, saved)
        self._install(model, adapter)
        # Afterwards: what the base weights give up is what the adapter began with.
        self.load_report = fitted.apply(adapter, model)
        self.set_train(is_trainable)
        return self

    def load_adapter(
        self,
        model_id: str | os.PathLike,
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        *,
        strict: bool = True,
        ignore_mismatched_sizes: bool = False,
        **hub: Any,
    ) -> LoadReport:
        """Add an adapter from files, inactive; or, if the name is taken, put it in that adapter's place.

        An adapter whose config differs from the file's is replaced whole; otherwise its weights are overwritten.
        Unless it is to be trained, the whole model is set to evaluation.

        Args and errors: as `from_pretrained`; a config of another method is a ConfigError. `torch_device` is HF's:
        MindSpore moves tensors to its device by itself.

        Returns:
            What was loaded, with HF's `missing_keys` and `unexpected_keys`; also kept as `load_report`.

        Differs: HF returns the keys that did not fit and says nothing; here they are an error, or with strict=False a
        warning. HF keeps the old adapter's scaling when it overwrites the weights.
        """
        _refuse_offload(ephemeral_gpu_offload)
        config = _config_for(model_id, None, is_trainable, hub)
        self._check_method(config)
        base, tensors = self.get_base_model(), read_tensors(model_id, key_mapping=key_mapping, **hub)
        tensors = unpacked(tensors, config)
        config = with_copies_in(tensors, config, base)
        undrawn = low_cpu_mem_usage or config.is_prompt_learning
        adapter = self._prepare(base, config, adapter_name, autocast_adapter_dtype, undrawn, False)
        tensors, saved = resumable(tensors, adapter, model_id, **hub)
        old = self.peft_config.get(adapter_name)
        same = old is not None and adapter.prompt is None and _alike(old, adapter.config)
        if same:
            adapter = adapter_in(base, adapter_name)
        fitted = fit(tensors, adapter, base)
        fitted.report.check(strict, ignore_mismatched_sizes, undrawn)
        check_rows(fitted, adapter, saved)
        if old is not None:
            switch.unmerge_first(base, f"Adapter {adapter_name} cannot be overwritten when the model is merged.")
        if not same:
            inject.attach(base, adapter)
            inject.use(base, self.active_adapters)
            inject.settle(self)
        self.load_report = fitted.apply(adapter, base)
        self._switches.set_requires_grad(adapter_name, is_trainable)
        if not is_trainable:
            self.set_train(False)
        return self.load_report

    def _check_method(self, config: PeftConfig) -> None:
        here = {str(other.peft_type) for other in self.peft_config.values()}
        if here and getattr(config, "peft_type", None) not in here:
            raise ConfigError(
                f"Cannot combine adapters with different peft types. Found {here.pop()} and "
                f"{getattr(config, 'peft_type', type(config))}."
            )


def _first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the model is called on: the first argument, or `input_ids`, or else the first named tensor."""
    if args:
        return args[0]
    named = [kwargs.get("input_ids"), *kwargs.values()]
    found = next((value for value in named if isinstance(value, Tensor | np.ndarray)), None)
    if found is None:
        raise ValueError("the model was given no tensor, so no rows to be divided among adapters")
    return found


def _refuse_offload(ephemeral_gpu_offload: bool) -> None:
    if ephemeral_gpu_offload:
        raise NotImplementedError(
            "ephemeral_gpu_offload=True is for layers on another device, and a MindSpore process has one: leave it out"
        )


def _config_for(
    model_id: str | os.PathLike, config: PeftConfig | None, is_trainable: bool, hub: dict[str, Any]
) -> PeftConfig:
    if config is None:
        config = PeftConfig.from_pretrained(model_id, **hub)
    elif not isinstance(config, PeftConfig):
        raise ConfigError(f"The input config must be a PeftConfig, got {type(config)}")
    config = copy.deepcopy(config)
    config.inference_mode = not is_trainable
    return config


def _alike(one: PeftConfig, other: PeftConfig) -> bool:
    """Whether two configs make the same adapter: what only describes where it came from does not count."""
    described = ("inference_mode", "base_model_name_or_path", "revision", "peft_version", "auto_mapping", "task_type")
    return all(value == other.to_dict().get(key) for key, value in one.to_dict().items() if key not in described)
