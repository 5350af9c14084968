"""What a PeftModel writes: adapter files, model cards, commits on the Hub."""

import copy
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from huggingface_hub import CommitInfo

from msft_peft.backend import arguments
from msft_peft.backend.files import replacing_all
from msft_peft.backend.hub import Target
from msft_peft.backend.tree import Named
from msft_peft.config import PeftConfig, TaskType
from msft_peft.core.adapter import Adapter, adapter_in
from msft_peft.core.prepare import unmerged
from msft_peft.errors import AdapterNameError
from msft_peft.hosts import class_of, model_config
from msft_peft.io.adapter import (
    embeddings_to_save,
    save_prompt_encoder,
    save_tensors,
)
from msft_peft.io.card import CARD_NAME, About, write_card
from msft_peft.io.state import State, entries_from, taken_from
from msft_peft.model.prompted import Prompted
from msft_peft.tuners.lora.residual import as_plain_lora

# Where an adapter of this name is saved: in the folder itself; others get a folder of their own below it.
ROOT_ADAPTER = "default"


class Saving(Prompted):
    """The part of `PeftModel` that writes its adapters; an adapter's files appear all together or not at all."""

    # What a task class says of itself: the task, and what the Hub calls it.
    _task: ClassVar[TaskType | None] = None
    _pipeline_tag: ClassVar[str | None] = None

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
            adapter = adapter_in(base, name)
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
            with unmerged(base, own), replacing_all(target) as scratch:
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

    adapter: Adapter
    entries: dict[str, Named]
    config: PeftConfig
    keeps_encoder: bool


def _told(about: About, metrics: Mapping[str, float] | None, tags: Sequence[str]) -> About:
    """The same, with what the caller tells of the adapter."""
    more = arguments.strings("tags", tags or ())
    return replace(about, metrics=arguments.mapping("metrics", metrics or {}), tags=[*about.tags, *more])
