"""Configs and their JSON: the same fields, defaults and files as HF peft's."""

import dataclasses
import functools
import json
import math
import os
import re
import tempfile
import types
import typing
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub import CommitInfo

from msft_peft.backend import arguments
from msft_peft.backend.files import write_text
from msft_peft.backend.hub import Target, fetch
from msft_peft.errors import ConfigError, HubError, PeftWarning

HF_PEFT_VERSION = "0.21.2"
CONFIG_NAME = "adapter_config.json"
# HF peft's methods that are not built here, and how its classes of them begin.
NOT_BUILT = {
    "ADAMSS": "Adamss",
    "FROD": "Frod",
    "PSOFT": "Psoft",
    "SHADOW": "Shadow",
    "XLORA": "XLora",
}


class TaskType(str, Enum):
    """What the model is for; it decides which `PeftModelFor...` class wraps it."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


@dataclass
class PeftConfig:
    """What every config has.

    Args:
        task_type: a `TaskType` or its name; None for a model that is none of them.
        peft_type: the method; fixed by the class.
        auto_mapping: where to import the base model from, written on saving when `task_type` is None.
        peft_version: version of HF peft whose format this follows; the one that is matched by default.
        base_model_name_or_path: the base model that the adapter was made for.
        revision: of the base model.
        inference_mode: the adapter is loaded frozen.

    Raises:
        ConfigError: `task_type` is none of `TaskType`, or a value is none that its field's annotation allows.
    """

    # Fields that HF's class of this name lacks: files hold them only where they are used.
    beyond_hf: ClassVar[tuple[str, ...]] = ()

    task_type: str | TaskType | None = None
    peft_type: str | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    def __post_init__(self) -> None:
        names = [task.value for task in TaskType]
        if self.task_type is not None and self.task_type not in names:
            raise ConfigError(
                f"Invalid task type: '{self.task_type}'. Must be one of the following task types: {', '.join(names)}."
            )
        self.peft_version = self.peft_version or HF_PEFT_VERSION
        for name, hint in _hints(type(self)).items():  # type: ignore[arg-type]
            value = getattr(self, name)
            # None stands for the default of many a field. It would count as False, and "no" as True.
            if not _fits(value, hint) and (value is not None or hint is bool):
                raise ConfigError(f"`{name}` must be {_named(hint)}, got {value!r}")

    @property
    def is_prompt_learning(self) -> bool:
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        return False

    def require_built(self) -> None:
        """Raise NotImplementedError, naming the field, if this config asks for something that is not built yet."""
        return None

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data, nested configs included."""
        fields = _plain(dataclasses.asdict(self))
        return {name: value for name, value in fields.items() if name not in self.beyond_hf or value is not None}

    def to_json(self) -> str:
        """The text of `adapter_config.json`: HF's keys, sorted, so that equal configs give equal bytes."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True)

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write `adapter_config.json` into `save_directory`, atomically.

        Raises:
            NotADirectoryError: the path is a file.
        """
        write_text(arguments.path("save_directory", save_directory) / CONFIG_NAME, self.to_json())

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
    ) -> CommitInfo:
        """Upload `adapter_config.json` alone; see `PeftModel.push_to_hub` for the arguments.

        Raises:
            HubError: no right to, no network, or a repository that is there and not as `private` says.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            target = Target(repo_id, token, private, revision, create_pr)
            return target.commit(Path(folder), commit_message or "Upload config", commit_description)

    @classmethod
    def from_dict(cls, fields: dict[str, Any], origin: str = "the given dict") -> "PeftConfig":
        """The config that `fields` describe, of the class that their `peft_type` names.

        Fields that the class does not know are dropped with one warning (files of newer versions have them).

        Raises:
            ConfigError: no or an unknown `peft_type`, or a value that the class refuses; `origin` is named.
        """
        if not isinstance(fields, Mapping):
            raise ConfigError(f"{origin} must be a dict of fields, got {type(fields).__name__}")
        if "runtime_config" in fields:
            warnings.warn(
                f"{origin} contains a `runtime_config` key. This is ignored. Runtime configurations are only valid at "
                "runtime.",
                PeftWarning,
                stacklevel=3,
            )
            fields = {key: value for key, value in fields.items() if key != "runtime_config"}
        found = cls._class_for(fields.get("peft_type", cls.peft_type), origin)
        known = {f.name for f in dataclasses.fields(found) if f.init}
        unknown = sorted(set(fields) - known)
        if unknown:
            warnings.warn(
                f"Unexpected keyword arguments {unknown} for class {found.__name__}, these are ignored. "
                f"They come from {origin}, which a newer version of the library may have written.",
                PeftWarning,
                stacklevel=3,
            )
        try:
            return found(**{key: value for key, value in fields.items() if key in known})
        except NotImplementedError as error:
            raise NotImplementedError(f"{origin}: {error}") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"{origin} is no valid {found.__name__}: {error}") from error

    @classmethod
    def from_peft_type(cls, **fields: Any) -> "PeftConfig":
        """`from_dict` with the fields as arguments."""
        return cls.from_dict(fields)

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike) -> dict[str, Any]:
        """The fields in a JSON file, as they stand there.

        Raises:
            ConfigError: the file is no JSON object; it is named.
        """
        try:
            fields = json.loads(arguments.path("path_json_file", path_json_file).read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path_json_file} is no valid JSON: {error}") from error
        if not isinstance(fields, dict):
            raise ConfigError(f"{path_json_file} must hold a JSON object, got {type(fields).__name__}")
        return fields

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, subfolder: str | None = None, **hub: Any
    ) -> "PeftConfig":
        """Read `adapter_config.json` from a directory or a Hub repository.

        Args:
            pretrained_model_name_or_path: a directory, or a repository id.
            subfolder: folder below it.
            hub: `revision`, `token`, `cache_dir`, `local_files_only`, `force_download` for `huggingface_hub`.

        Raises:
            ConfigError: the file is missing ("Can't find 'adapter_config.json' at ..."), broken or of unknown type.
        """
        where = f"Can't find '{CONFIG_NAME}' at '{pretrained_model_name_or_path}'"
        try:
            path = fetch(pretrained_model_name_or_path, CONFIG_NAME, subfolder=subfolder, **hub)
        except (FileNotFoundError, HubError) as error:
            raise ConfigError(f"{where}: {error}") from error
        if path is None:
            raise ConfigError(where)
        return cls.from_dict(cls.from_json_file(path), origin=str(path))

    @classmethod
    def _class_for(cls, peft_type: Any, origin: str) -> type["PeftConfig"]:
        """The config class whose `peft_type` is this, looked for among all classes that exist."""
        if peft_type is None:
            raise ConfigError(f"{origin} names no 'peft_type', so nothing says which method it configures")
        by_type = {sub.peft_type: sub for sub in _subclasses(PeftConfig) if sub.peft_type is not None}
        if isinstance(peft_type, str) and peft_type in NOT_BUILT and peft_type not in by_type:
            raise ConfigError(
                f"{origin} has peft_type={peft_type!r}, a method of HF peft that is not built here yet; there are "
                f"{sorted(by_type)}"
            )
        if not isinstance(peft_type, str) or peft_type not in by_type:
            raise ConfigError(
                f"{origin} has peft_type={peft_type!r}, which this version does not have; it has {sorted(by_type)}"
            )
        return by_type[peft_type]


@dataclass
class TargetedConfig(PeftConfig):
    """A config of a method that works on chosen layers of the model.

    Args:
        target_modules: a list of layer names (a whole path, or the end of one from a dot on), a regex for the whole
            path, "all-linear", or None for the architecture's usual layers.
        exclude_modules: a list or a regex of the same kind; wins over `target_modules`.
        layers_to_transform: index or indices of the blocks to work on; only with a list of targets.
        layers_pattern: name or names of the list that holds the blocks, where its path is ambiguous.
        modules_to_save: layers to train whole, as copies, beside the adapter (a new head, say).

    Raises:
        ConfigError: layer indices beside a regex or "all-linear", or a pattern without indices.
    """

    # Fields whose keys are patterns for layers' paths.
    patterned: ClassVar[tuple[str, ...]] = (
        *("rank_pattern", "alpha_pattern", "lambda_pattern"),
        *("block_size_pattern", "n_frequency_pattern"),
    )

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str):
                check_regex(name, value)
            elif value is not None:
                # HF keeps these as sets, whose order changes from run to run, and its files with it.
                setattr(self, name, sorted(set(value)))
        for pattern in [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern or []:
            check_regex("layers_pattern", pattern)
        self.modules_to_save = _names(self.modules_to_save)
        self._check_layers()

    def _check_layers(self) -> None:
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ConfigError(f"`{name}` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError("When `layers_pattern` is specified, `layers_to_transform` must also be specified. ")


def check_positive(where: str, value: Any) -> None:
    """Raise ConfigError, naming the field, if `value` is no positive integer."""
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ConfigError(f"`{where}` should be a positive integer value but the value passed is {value}")


def check_seed(where: str, value: Any) -> None:
    """Raise ConfigError, naming the field, if `value` is no integer that a random generator can begin with."""
    if isinstance(value, bool) or not isinstance(value, int) or not -(2**63) <= value < 2**64:
        raise ConfigError(f"`{where}` should be an integer in [-2**63, 2**64) but the value passed is {value!r}")


def check_finite(where: str, value: Any) -> None:
    """Raise ConfigError, naming the field, if `value` is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"`{where}` should be a finite number but the value passed is {value!r}")


def check_probability(where: str, value: Any) -> None:
    """Raise ConfigError, naming the field, if `value` is no probability below one."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value < 1.0:
        raise ConfigError(f"`{where}` is a probability in [0, 1), got {value!r}")


def check_bias(bias: str, method: str) -> None:
    """Raise NotImplementedError (HF's kind of error) if `bias` is none of "none", "all" and "<method>_only"."""
    known = ("none", "all", f"{method}_only")
    if bias not in known:
        raise NotImplementedError(f"Requested bias: {bias}, is not implemented. There are {known}.")


def check_patterns(where: str, patterns: Mapping[str, Any], check: Callable[[str, Any], None]) -> None:
    """Raise ConfigError if a key is no regular expression, or `check` refuses a value."""
    for pattern, value in patterns.items():
        check_regex(where, pattern)
        check(f"{where}[{pattern!r}]", value)


def check_types(settings: Any) -> None:
    """Raise ConfigError, naming the field, if one of a dataclass holds what its annotation does not say."""
    hints = typing.get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        value, hint = getattr(settings, field.name), hints[field.name]
        if not _fits(list(value) if isinstance(value, tuple | set | frozenset) else value, hint):
            raise ConfigError(f"`{field.name}` must be {_named(hint)}, got {value!r}")


@dataclass
class PromptLearningConfig(PeftConfig):
    """A config of a method that puts virtual tokens, or keys and values, before the input; nothing is wrapped.

    Args:
        num_virtual_tokens: how many; must be given.
        token_dim: width of one: of the embeddings, or of all key heads of a layer. Known of models with a config.
        num_transformer_submodules: 2 makes twice as many, for encoder and decoder; by default 2 for SEQ_2_SEQ_LM and
            otherwise 1.
        num_attention_heads: of keys and values. Known of models with a config.
        num_layers: how many layers have keys and values. Known of models with a config.
        modules_to_save: layers to train whole, as copies, beside the virtual tokens (a new head, say).

    Raises:
        ConfigError: a number that is none, or below 1.
    """

    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers"):
            check_count(name, getattr(self, name))
        if self.num_transformer_submodules not in (None, 1, 2):
            raise ConfigError(f"num_transformer_submodules must be 1 or 2, got {self.num_transformer_submodules!r}")
        self.modules_to_save = _names(self.modules_to_save)

    @property
    def is_prompt_learning(self) -> bool:
        return True


def check_count(where: str, value: Any) -> None:
    """Raise ConfigError, naming the field, if `value` is neither None nor a whole number of at least 1."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ConfigError(f"`{where}` must be a whole number of at least 1, got {value!r}")


def as_member(where: str, kind: type[Enum], value: Any) -> Any:
    """The member of an Enum that `value` is or names.

    Raises:
        ConfigError: it is none; the field and the members are named.
    """
    try:
        return kind(value)
    except ValueError as error:
        raise ConfigError(f"{where} must be one of {[member.value for member in kind]}, got {value!r}") from error


def _names(given: Any) -> list[str] | None:
    """A list of names, each once; a set in alphabetical order."""
    if given is None:
        return None
    return sorted(given) if isinstance(given, set | frozenset) else list(dict.fromkeys(given))


def check_regex(where: str, pattern: str) -> None:
    """Raise ConfigError, naming the field, if `pattern` is no regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"`{where}`: {pattern!r} is no valid regular expression: {error}") from error


@functools.cache
def _hints(kind: type[PeftConfig]) -> dict[str, Any]:
    """The annotation of each field."""
    hints = typing.get_type_hints(kind)
    return {one.name: hints[one.name] for one in dataclasses.fields(kind)}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value can be what a field's annotation says: any collection is a list, int or float a number."""
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    collection = isinstance(value, Collection) and not isinstance(value, str | bytes | Mapping)
    if kind in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if kind is typing.Literal:
        return value in inner
    if kind is tuple and Ellipsis not in inner:
        return collection and len(value) == len(inner) and all(map(_fits, value, inner))
    if kind in (list, tuple, set):
        return collection and all(_fits(item, inner[0]) for item in value)
    if kind in (dict, Mapping):
        return isinstance(value, Mapping) and all(
            _fits(key, inner[0]) and _fits(item, inner[1]) for key, item in value.items()
        )
    if hint in (int, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return isinstance(value, str | hint)
    return hint is Any or not isinstance(hint, type) or isinstance(value, hint)


def _named(hint: Any) -> str:
    if hint is bool:
        return "True or False"
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


def _plain(value: Any) -> Any:
    """JSON's types only: enums become their values, sets and tuples lists."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(_plain(item) for item in value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _subclasses(cls: type[PeftConfig]) -> set[type[PeftConfig]]:
    return {cls}.union(*(_subclasses(sub) for sub in cls.__subclasses__()))
