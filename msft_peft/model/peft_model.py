"""PeftModel: what a user holds. HF's names over a Tuner, and the files."""

import contextlib
import copy
import functools
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from huggingface_hub import CommitInfo
from mindspore import Tensor, nn

from msft_peft.backend import arguments
from msft_peft.backend.files import replacing_all
from msft_peft.backend.hub import Target
from msft_peft.backend.tree import Named, inherit_mode
from msft_peft.config import PeftConfig, TaskType
from msft_peft.core import inject, switch
from msft_peft.core.layer import buffers_in, wrappers
from msft_peft.core.mixed_batch import divided
from msft_peft.core.routing import invocations
from msft_peft.core.tuner import Tuner
from msft_peft.errors import AdapterNameError, ConfigError
from msft_peft.hosts import as_cell, class_of, facade, model_config
from msft_peft.io.adapter import (
    embeddings_to_save,
    read_tensors,
    resumable,
    save_prompt_encoder,
    save_tensors,
    unpacked,
    with_copies_in,
)
from msft_peft.io.card import CARD_NAME, About, write_card
from msft_peft.io.load import LoadReport, check_rows, fit
from msft_peft.io.state import State, entries_from, taken_from
from msft_peft.model.prompted import Prompted, PromptSwitches
from msft_peft.model.status import TunerLayerStatus, TunerModelStatus, get_layer_status, get_model_status
from msft_peft.registry import method_of
from msft_peft.tuners.lora.residual import as_plain_lora

# Where an adapter of this name is saved: in the folder itself; others get a folder of their own below it.
ROOT_ADAPTER = "default"
# Methods of tuners that mean nothing to prompts, and what to do instead.
_MERGES = "so there is nothing to merge or to take out. get_base_model() is the model without them."
_SWITCHES = "so there are no layers to switch. `with model.disable_adapter():` runs the model without them."
_OF_LAYERS = {
    **dict.fromkeys(("merge_adapter", "unmerge_adapter", "merge_and_unload", "unload"), _MERGES),
    **dict.fromkeys(("enable_adapter_layers", "disable_adapter_layers"), _SWITCHES),
}


class PeftModel(Prompted):
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
        ConfigError, NoMatchingPeftModuleError, AdapterNameError, NotImplementedError: see `core.inject.prepare`; the
            model is then as it was.
    """

    # What a task class says of itself: the task, and the heads that its models have, which are trained whole.
    _task: ClassVar[TaskType | None] = None
    _heads: ClassVar[tuple[str, ...]] = ()
    _pipeline_tag: ClassVar[str | None] = None

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
    ) -> inject.Adapter:
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
        return inject.prepare(model, config, name, autocast, low_cpu_mem_usage)

    def _install(self, model: nn.Cell, adapter: inject.Adapter) -> None:
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
        return inject.configs_of(self.get_base_model())

    @property
    def active_adapters(self) -> list[str]:
        """The names of the adapters in use."""
        return inject.active_of(self.get_base_model())

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
            ConfigError: another method than that of the adapters in the model; for others see `core.inject.prepare`.
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

    # --- files --------------------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: bool | str = "auto",
        is_main_process: bool = True,
        state_dict: State | None = None,
        path_initial_model_for_weight_conversion: str | os.PathLike | None = None,
        save_prompt_encoder_weights: bool = True,
    ) -> None:
        """Write the adapters: weights in both formats, config and model card; trainable weights alone.

        The adapter "default" goes into the directory itself, others into a folder of their name below it. An adapter's
        files are replaced all together or not at all, even if the process is killed meanwhile, and the same adapter
        gives the same bytes.

        Args:
            save_directory: made if it is not there.
            safe_serialization: must be True: torch's pickles are not written.
            selected_adapters: which; all by default.
            save_embedding_layers: True adds the base model's input and output embeddings (do so if you resized them);
                "auto" those of them that the adapter targets, as HF does; False none.
            is_main_process: False writes nothing (the other workers of a distributed run).
            state_dict: take the values from here (under parameter names, as in `model.parameters_dict()`), not from
                the model: gathered ones, say, or those of an earlier step.
            path_initial_model_for_weight_conversion: where an adapter that changed the base weights (PiSSA, OLoRA,
                CorDA, LoRA-GA) was saved before its first step: it is written as a plain LoRA of twice the rank for
                the untouched base, see `as_plain_lora`.
            save_prompt_encoder_weights: where a network makes the virtual tokens (P-tuning, projected prefixes, CPT),
                keep it too, in a file of its own which HF passes over, so that training can go on from there.

        Raises:
            AdapterNameError: a selected adapter is not there.
            LoadError: `state_dict` lacks tensors, or has others of their names; nothing is written.
            NotADirectoryError: the path is a file.
        """
        folder = arguments.path("save_directory", save_directory)
        if folder.is_file():
            raise NotADirectoryError(f"Provided path ({save_directory}) should be a directory, not a file")
        names = self._names_to_save(safe_serialization, selected_adapters)
        if not is_main_process:
            return
        initial = path_initial_model_for_weight_conversion
        plan = self._plan_files(names, save_embedding_layers, state_dict, initial, save_prompt_encoder_weights)
        self._write_files(folder, plan)
        write_card(folder, self._about(plan))

    def create_or_update_model_card(
        self, output_dir: str | os.PathLike, metrics: Mapping[str, float] | None = None, tags: Sequence[str] = ()
    ) -> None:
        """Write README.md, or bring the metadata and results of the one that is there up to date.

        Args:
            output_dir: made if it is not there.
            metrics: results to tell, by name; they replace those that were told before.
            tags: further tags for the Hub.
        """
        folder = arguments.path("output_dir", output_dir)
        about = self._about(self._plan_files(sorted(self.peft_config)))
        write_card(folder, _told(about, metrics, tags))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
        revision: str | None = None,
        tags: Sequence[str] = (),
        metrics: Mapping[str, float] | None = None,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: bool | str = "auto",
        path_initial_model_for_weight_conversion: str | os.PathLike | None = None,
        save_prompt_encoder_weights: bool = True,
    ) -> CommitInfo:
        """Upload what `save_pretrained` writes, in one commit: all of it is on the Hub afterwards, or nothing.

        The repository is made if it is not there. The text of a README.md that it has is kept.

        Args:
            repo_id: "owner/name", or a name in one's own account.
            commit_message, commit_description: of the commit.
            private: of a new repository.
            token: who one is; default: who is logged in.
            create_pr: open a pull request instead.
            revision: a branch, made if it is not there; default: main.
            tags, metrics: see `create_or_update_model_card`.
            safe_serialization, selected_adapters, save_embedding_layers, path_initial_model_for_weight_conversion,
                save_prompt_encoder_weights: see `save_pretrained`.

        Returns:
            The commit; with `pr_url` where a pull request was opened.

        Raises:
            AdapterNameError: a selected adapter is not there.
            HubError: no right to, no network, or a repository that is there and not as `private` says.

        Differs: HF's also takes options that do nothing for adapters (`max_shard_size`, `use_temp_dir`).
        """
        names = self._names_to_save(safe_serialization, selected_adapters)
        initial = path_initial_model_for_weight_conversion
        plan = self._plan_files(names, save_embedding_layers, None, initial, save_prompt_encoder_weights)
        about = self._about(plan)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            self._write_files(folder, plan)
            target = Target(repo_id, token, private, revision, create_pr)
            target.copy(CARD_NAME, folder)
            write_card(folder, replace(_told(about, metrics, tags), where=target.repo_id))
            return target.commit(folder, commit_message or "Upload model", commit_description)

    def _names_to_save(self, safe_serialization: bool, selected: list[str] | None) -> list[str]:
        """The adapters to save, which are all there."""
        if not safe_serialization:
            raise NotImplementedError("safe_serialization=False (torch pickles) is not written; leave it at True")
        names = sorted(self.peft_config) if selected is None else arguments.adapter_names(selected)
        if any(name not in self.peft_config for name in names):
            raise AdapterNameError(
                f"You passed an invalid `selected_adapters` arguments, current supported adapter names are "
                f"{sorted(self.peft_config)} - got {names}."
            )
        return names

    def _plan_files(
        self,
        names: list[str],
        save_embedding_layers: bool | str = False,
        state_dict: State | None = None,
        initial: str | os.PathLike | None = None,
        save_prompt_encoder_weights: bool = True,
    ) -> dict[str, "_Files"]:
        """What the files of each adapter are to hold: its tensors, and its config as it is saved."""
        base = self.get_base_model()
        plan = {}
        for name in names:
            adapter = inject.adapter_in(base, name)
            beside = embeddings_to_save(base, adapter, save_embedding_layers)
            if state_dict is not None:
                adapter, entries = entries_from(state_dict, adapter, base)
                beside = taken_from(state_dict, beside, adapter.prefix)
            else:
                entries = adapter.entries(base)
            config = adapter.config
            if initial is not None:
                entries, config = as_plain_lora(adapter, entries, initial)
            files = _Files(adapter, entries | beside, self._config_to_save(config), save_prompt_encoder_weights)
            plan[name] = files
        return plan

    def _write_files(self, folder: Path, plan: Mapping[str, "_Files"]) -> None:
        base = self.get_base_model()
        for name, files in plan.items():
            target = folder / ("" if name == ROOT_ADAPTER else name)
            # Biases and embeddings of the base model may be among them.
            own = [named.parameter for named in files.entries.values()]
            with inject.unmerged(base, own), replacing_all(target) as scratch:
                save_tensors(scratch, name, files.entries, files.adapter.prefix, files.config)
                save_prompt_encoder(scratch, files.adapter, files.keeps_encoder)
                files.config.save_pretrained(scratch)

    def _about(self, plan: Mapping[str, "_Files"]) -> About:
        """What the model card tells."""
        kind = type(self)
        return About(
            config=next((files.config for files in plan.values()), None),
            base=self._base_name(),
            trained=sum(math.prod(named.shape) for files in plan.values() for named in files.entries.values()),
            auto=None if kind._task is None else f"Auto{kind.__name__}",
            pipeline=self._pipeline_tag,
            tags=["transformers"] if "_name_or_path" in model_config(self.get_base_model()) else [],
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
            adapter = inject.adapter_in(base, adapter_name)
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

    # ------------------------------------------------------------------------------------------------------------

    def _check_method(self, config: PeftConfig) -> None:
        here = {str(other.peft_type) for other in self.peft_config.values()}
        if here and getattr(config, "peft_type", None) not in here:
            raise ConfigError(
                f"Cannot combine adapters with different peft types. Found {here.pop()} and "
                f"{getattr(config, 'peft_type', type(config))}."
            )

    def _base_name(self) -> str | None:
        base = self.get_base_model()
        settings = model_config(base)
        return settings.get("_name_or_path") or settings.get("name_or_path") or getattr(base, "name_or_path", None)

    def _config_to_save(self, config: PeftConfig) -> PeftConfig:
        """What the file says: it is read for inference first of all, and names the base model."""
        config = copy.deepcopy(config)
        config.inference_mode = True
        config.base_model_name_or_path = config.base_model_name_or_path or self._base_name()
        if config.task_type is None:
            kind = class_of(self.get_base_model())
            # Our reference models bear the names of the classes that HF's AutoPeftModel would import.
            library = getattr(kind, "parent_library", kind.__module__)
            config.auto_mapping = {"base_model_class": kind.__name__, "parent_library": library}
        return config


@dataclass(frozen=True)
class _Files:
    """What the files of an adapter are to hold.

    Attributes:
        adapter: the adapter.
        entries: its tensors.
        config: as it is saved.
        keeps_encoder: the network that makes its virtual tokens, if there is one, gets a file of its own.
    """

    adapter: inject.Adapter
    entries: dict[str, Named]
    config: PeftConfig
    keeps_encoder: bool


def _told(about: About, metrics: Mapping[str, float] | None, tags: Sequence[str]) -> About:
    """The same, with what the caller tells of the adapter."""
    more = arguments.strings("tags", tags or ())
    return replace(about, metrics=arguments.mapping("metrics", metrics or {}), tags=[*about.tags, *more])


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
