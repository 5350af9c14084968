"""The Auto classes: an adapter with the base model that it was made for, from the adapter's name alone."""

import copy
import importlib
import inspect
import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from mindspore import nn

import msft_peft.models as reference
from msft_peft.backend.hub import fetch_optional
from msft_peft.config import PeftConfig, TaskType
from msft_peft.core.keys import PREFIX
from msft_peft.errors import ConfigError, NoBaseModelError
from msft_peft.hosts import hf_names, input_table, output_head
from msft_peft.hosts.providers import PROVIDERS
from msft_peft.io.adapter import read_tensors
from msft_peft.model import (
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)

OWN = "msft_peft"
TOKENIZER_NAME = "tokenizer.json"

# Options that both the base model and the adapter are fetched with.
_SHARED = ("token", "cache_dir", "local_files_only", "force_download")
_ADAPTER = set(inspect.signature(PeftModel.from_pretrained).parameters) - {"model", "model_id", "hub"}
# Whose classes an adapter's config may name: HF's own are looked for by name in MindSpore's libraries.
_TRUSTED = ("transformers", OWN, *(provider.name for provider in PROVIDERS))


class AutoPeftModel:
    """Loads an adapter together with its base model: `AutoPeftModel.from_pretrained(folder_or_repository)`.

    This one is for adapters without a task, whose config names the class of the base model (`auto_mapping`).
    """

    _target: ClassVar[type[PeftModel]] = PeftModel
    _base: ClassVar[str | None] = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise OSError(
            f"{type(self).__name__} is designed to be instantiated using the "
            f"`{type(self).__name__}.from_pretrained(pretrained_model_name_or_path)` method."
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        import_allowlist: Sequence[str] | None = None,
        provider: str | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Load the base model that the adapter's config names, then the adapter into it.

        The base model comes from msft_peft.models where it has that family; otherwise from the first of mindone,
        mindnlp and MindFormers that is installed and has it. If the adapter was trained with more tokens (its tensors
        or the tokenizer in its folder say so), the embeddings are resized first; a classifier gets as many labels as
        the adapter's head has.

        Args:
            pretrained_model_name_or_path: the adapter's folder or repository.
            adapter_name, is_trainable: see `PeftModel.from_pretrained`.
            config: used in place of the file's; its `base_model_name_or_path` too.
            revision: of the adapter. That of the base model is in the adapter's config.
            import_allowlist: further libraries that the config may have a class imported from.
            provider: "msft_peft", "mindone", "mindnlp" or "mindformers": no other is tried.
            kwargs: `subfolder` (of the adapter); `token`, `cache_dir`, `local_files_only`, `force_download` for both;
                the further arguments of `PeftModel.from_pretrained`; all others are for the base model (`dtype`,
                `num_labels`).

        Raises:
            ValueError: the adapter is for another task than this class; or names no base model, or a class from a
                library that is not to be imported.
            NoBaseModelError: no library that is installed has the base model; it says what to install.
            FileNotFoundError, LoadError, HubError: see `PeftModel.from_pretrained`.

        Differs: HF resizes for a tokenizer alone, and passes `subfolder` on to the base model as well.
        """
        hub = {name: kwargs.pop(name) for name in _SHARED if name in kwargs}
        here = {name: value for name, value in (("revision", revision),) if value is not None} | hub
        if "subfolder" in kwargs:
            here["subfolder"] = kwargs.pop("subfolder")
        for_adapter = {name: kwargs.pop(name) for name in list(kwargs) if name in _ADAPTER}
        if config is None:
            config = PeftConfig.from_pretrained(pretrained_model_name_or_path, **here)
        class_name, library = cls._base_class(config, import_allowlist or ())
        if not config.base_model_name_or_path:
            raise ConfigError(
                f"The config of '{pretrained_model_name_or_path}' names no base model. Load it yourself and call "
                f"{cls._target.__name__}.from_pretrained(base_model, ...), or pass a config= that names it."
            )
        arrays = read_tensors(pretrained_model_name_or_path, **here).arrays
        options = {**hub, **({"revision": config.revision} if config.revision else {}), **kwargs}
        labels = {**_labels(config, arrays), **options}
        base = _load(class_name, library, config.base_model_name_or_path, provider, options, labels)
        _resize(base, arrays, _tokens_in(pretrained_model_name_or_path, here))
        return cls._target.from_pretrained(
            base,
            pretrained_model_name_or_path,
            adapter_name=adapter_name,
            is_trainable=is_trainable,
            config=copy.deepcopy(config),
            **for_adapter,
            **here,
        )

    @classmethod
    def _base_class(cls, config: PeftConfig, allowed: Sequence[str]) -> tuple[str, str]:
        """The name of the base model's class, and the library that the config says it is from."""
        task = config.task_type
        if task is not None:
            if cls._base is None:
                raise ValueError(
                    "Cannot use `AutoPeftModel` with a task type, please use a specific class for your task type. "
                    "(e.g. `AutoPeftModelForCausalLM` for `task_type='CAUSAL_LM'`)"
                )
            if cls._target._task != task:
                raise ValueError(
                    f"Expected target PEFT class: {PeftModel._for_task(config).__name__}, but you have asked for: "
                    f"{cls._target.__name__} make sure that you are loading the correct model for your task type."
                )
            return cls._base, "transformers"
        mapping = config.auto_mapping
        if mapping is None and cls._base is not None:
            return cls._base, "transformers"
        if not isinstance(mapping, Mapping) or not {"base_model_class", "parent_library"} <= set(mapping):
            raise ValueError(
                "Cannot infer the auto class from the config: it has neither a task_type nor an auto_mapping. Please "
                "make sure that you are loading the correct model for your task type."
            )
        library = str(mapping["parent_library"])
        if not any(library == name or library.startswith(name + ".") for name in (*_TRUSTED, *allowed)):
            raise ValueError(
                f"The auto mapping wants to import '{library}' which is not in the import allowlist. If you are sure "
                f"that importing this library is safe, specify `import_allowlist=['{library}']` in "
                "`from_pretrained()`."
            )
        return str(mapping["base_model_class"]), library


class AutoPeftModelForCausalLM(AutoPeftModel):
    """Loads a decoder that predicts the next token, with its adapter."""

    _target, _base = PeftModelForCausalLM, "AutoModelForCausalLM"


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """Loads an encoder-decoder with its adapter."""

    _target, _base = PeftModelForSeq2SeqLM, "AutoModelForSeq2SeqLM"


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """Loads a sequence classifier with its adapter."""

    _target, _base = PeftModelForSequenceClassification, "AutoModelForSequenceClassification"


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """Loads a token classifier with its adapter."""

    _target, _base = PeftModelForTokenClassification, "AutoModelForTokenClassification"


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """Loads an extractive reader with its adapter."""

    _target, _base = PeftModelForQuestionAnswering, "AutoModelForQuestionAnswering"


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """Loads an encoder with its adapter."""

    _target, _base = PeftModelForFeatureExtraction, "AutoModel"


def _load(
    class_name: str,
    library: str,
    name: str,
    provider: str | None,
    options: dict[str, Any],
    own_options: dict[str, Any],
) -> nn.Cell:
    """The base model, from the first provider that has it."""
    root = library.split(".")[0]
    if root not in _TRUSTED:
        return _from_library(library, class_name, name, options)
    loaders: dict[str, Callable[[], nn.Cell]] = {
        OWN: lambda: _own_class(class_name, name, options).from_pretrained(name, **own_options)
    }
    loaders |= {one.name: partial(one.load, class_name, name, **options) for one in PROVIDERS}
    chosen = provider or (root if root in loaders else None)
    if chosen is not None and chosen not in loaders:
        raise ValueError(f"provider={provider!r} is none of {', '.join(loaders)}.")
    reasons = []
    for library, load in loaders.items():
        if chosen in (None, library):
            try:
                return load()
            except NoBaseModelError as error:
                reasons.append(f"{library}: {error}")
    raise NoBaseModelError(
        f"No library here has the base model '{name}' ({class_name}):\n  "
        + "\n  ".join(reasons)
        + "\nInstall one that has it, or load the base model yourself and call PeftModel.from_pretrained(base, ...)."
    )


def _own_class(class_name: str, name: str, options: dict[str, Any]) -> Any:
    """Our reference model's class.

    Raises:
        NoBaseModelError: there is none.
    """
    kind = getattr(reference, class_name, None)
    if kind is None:
        raise NoBaseModelError(f"it has no {class_name}")
    if not hasattr(kind, "class_for"):
        return kind  # a model's own class, named by auto_mapping
    hub = {key: value for key, value in options.items() if key in (*_SHARED, "revision")}
    try:
        return kind.class_for(reference.AutoConfig.from_pretrained(name, **hub))
    except ValueError as error:
        raise NoBaseModelError(str(error)) from error


def _from_library(library: str, class_name: str, name: str, options: dict[str, Any]) -> nn.Cell:
    """A model of a user's own class, from a library that the caller allowed."""
    kind = getattr(importlib.import_module(library), class_name, None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Cell) and hasattr(kind, "from_pretrained")):
        raise NoBaseModelError(f"'{library}' has no nn.Cell class '{class_name}' with a from_pretrained.")
    return kind.from_pretrained(name, **options)


_HEADS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")


def _labels(config: PeftConfig, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """For a classifier: as many labels as the adapter's head has, which takes the place of the base model's."""
    if config.task_type not in (TaskType.SEQ_CLS, TaskType.TOKEN_CLS):
        return {}
    sizes = [array.shape[0] for key, array in arrays.items() if key.endswith(_HEADS) and array.ndim == 2]
    return {"num_labels": sizes[0], "ignore_mismatched_sizes": True} if sizes else {}


def _tokens_in(source: str | os.PathLike, hub: dict[str, Any]) -> int:
    """The number of tokens of the tokenizer beside the adapter; 0 where there is none."""
    path = fetch_optional(source, TOKENIZER_NAME, **hub)
    if path is None:
        return 0
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        vocabulary = content["model"]["vocab"]
        ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else list(range(len(vocabulary)))
        return 1 + max([*ids, *(token["id"] for token in content.get("added_tokens") or [])], default=-1)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no tokenizer.json that can be read: {error!r}") from error


def _resize(base: nn.Cell, arrays: Mapping[str, Any], tokens: int) -> None:
    """Give the base model as many tokens as the adapter was trained with."""
    table, resize = input_table(base), getattr(base, "resize_token_embeddings", None)
    if table is None or resize is None:
        return
    weight = next((p for p in table.get_parameters() if p.ndim == 2), None)
    if weight is None:
        return
    trained = _trained_tokens(base, arrays)
    if trained is not None and trained != weight.shape[0]:
        resize(trained)
    elif trained is None and tokens > weight.shape[0]:
        resize(tokens)


def _trained_tokens(base: nn.Cell, arrays: Mapping[str, Any]) -> int | None:
    """The size of the vocabulary that the adapter's tensors at the embedding or the head show, if there are any."""
    hf_name = hf_names(base)
    paths = {id(cell): hf_name(path) for path, cell in base.cells_and_names()}
    for layer in (input_table(base), output_head(base)):
        path = paths.get(id(layer))
        if path is None:
            continue
        for end, axis in (("weight", 0), ("base_layer.weight", 0), ("lora_embedding_A", 1), ("lora_B.weight", 0)):
            array = arrays.get(f"{PREFIX}{path}.{end}")
            if array is not None and array.ndim == 2:
                return int(array.shape[axis])
    return None
