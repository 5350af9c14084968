"""Model configurations: attribute access over HuggingFace's `config.json`, with each family's defaults."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any, ClassVar

from msft_peft.backend.files import write_text
from msft_peft.models.checkpoint import CONFIG_FILE, resolve_folder

_COMMON = {
    "architectures": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.02,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "pad_token_id": None,
    "problem_type": None,
    "tie_word_embeddings": True,
    "use_cache": True,
}

_DECODER = {
    "attention_dropout": 0.0,
    "head_dim": None,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": None,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


class ModelConfig:
    """The settings of one model, as written in HF's `config.json`; unknown keys are kept and saved again.

    Every key is an attribute: `config.hidden_size`. Subclasses give `model_type` and the defaults of their family, so
    that a `config.json` may be as short as HF's are.

    Args:
        values: settings that differ from the family's defaults; `num_labels=n` names n labels "LABEL_0", ....

    Attributes:
        aliases: other names of settings, which read and write what the family's own name stands for: GPT-2's
            `config.hidden_size` is `config.n_embd`. Only the own name is saved.
    """

    architectures: list[str] | None
    model_type: ClassVar[str] = ""
    defaults: ClassVar[dict[str, Any]] = {}
    aliases: ClassVar[dict[str, str]] = {}

    def __getattr__(self, key: str) -> Any:
        """Any setting of the file: reached where the name is an alias, or none at all."""
        if key in type(self).aliases:
            return getattr(self, type(self).aliases[key])
        raise AttributeError(f"{type(self).__name__} has no setting '{key}'.")

    def __setattr__(self, key: str, value: Any) -> None:
        super().__setattr__(self.aliases.get(key, key), value)

    def __init__(self, **values: Any):
        settings = [*_COMMON.items(), *copy.deepcopy(self.defaults).items(), *values.items()]
        values = {self.aliases.get(key, key): value for key, value in settings}
        values.pop("model_type", None)
        self.name_or_path = str(values.pop("_name_or_path", "") or values.pop("name_or_path", ""))
        num_labels = values.pop("num_labels", None)
        id2label = values.pop("id2label", None)
        if num_labels is not None and len(id2label or {}) != num_labels:
            id2label = None
        if id2label is None:
            id2label = {i: f"LABEL_{i}" for i in range(2 if num_labels is None else num_labels)}
            values.pop("label2id", None)
        self.id2label = {int(i): label for i, label in id2label.items()}
        self.label2id = values.pop("label2id", None) or {label: i for i, label in self.id2label.items()}
        for key, value in values.items():
            setattr(self, key, value)
        self._complete()

    def _complete(self) -> None:
        """Fill the settings that follow from others."""

    @property
    def num_labels(self) -> int:
        """The number of classes of a classification head."""
        return len(self.id2label)

    @num_labels.setter
    def num_labels(self, count: int) -> None:
        self.id2label = {i: f"LABEL_{i}" for i in range(count)}
        self.label2id = {label: i for i, label in self.id2label.items()}

    @property
    def _name_or_path(self) -> str:
        """HF's older spelling of `name_or_path`."""
        return self.name_or_path

    def get(self, key: str, default: Any = None) -> Any:
        """Read a setting that may be absent."""
        return getattr(self, key, default)

    def update(self, values: dict[str, Any]) -> None:
        """Overwrite settings in place."""
        for key, value in values.items():
            setattr(self, key, value)

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as HF writes them, `model_type` included."""
        values = {key: copy.deepcopy(value) for key, value in vars(self).items() if key != "name_or_path"}
        return {**values, "model_type": self.model_type, "_name_or_path": self.name_or_path}

    def to_json_string(self) -> str:
        """Return the text of `config.json`; the same settings give the same bytes."""
        values = {key: value for key, value in self.to_dict().items() if key != "_name_or_path"}
        return json.dumps(values, indent=2, sort_keys=True) + "\n"

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write `config.json` into `folder`, which is made if need be."""
        write_text(Path(folder) / CONFIG_FILE, self.to_json_string())

    @classmethod
    def from_dict(cls, values: dict[str, Any], **overrides: Any) -> ModelConfig:
        """Build the config of the family that `values["model_type"]` names.

        Raises:
            TypeError: an override is no setting of the family.
            ValueError: the family is not built here, or is not the one that this class stands for.
        """
        found = values.get("model_type") or cls.model_type
        if cls.model_type and found != cls.model_type:
            raise ValueError(
                f"{cls.__name__} reads configs of model_type '{cls.model_type}', but this config.json says '{found}'. "
                f"Use AutoConfig, or the class of that family."
            )
        config = config_class(found)(**values)
        unknown = sorted(key for key in overrides if not hasattr(config, key))
        if unknown:
            raise TypeError(
                f"{unknown} are neither settings of {type(config).__name__} nor arguments that go to the Hub. Check "
                f"the spelling, or leave them out: what concerns torch alone has no meaning here."
            )
        return type(config)(**{**values, **overrides}) if overrides else config

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike, **kwargs: Any) -> ModelConfig:
        """Read `config.json` from a local folder or a Hub repository.

        Args:
            name_or_path: a folder, or a Hub id such as "Qwen/Qwen3-0.6B".
            kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, `subfolder` go to the Hub; all others
                override settings of the file.

        Raises:
            FileNotFoundError: there is no `config.json`.
            ValueError: it is not JSON, or its `model_type` is not supported.
        """
        folder, overrides = resolve_folder(name_or_path, [CONFIG_FILE], kwargs)
        values = read_json(os.path.join(folder, CONFIG_FILE))
        return cls.from_dict({**values, "_name_or_path": str(name_or_path)}, **overrides)

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ModelConfig) and self.to_dict() == other.to_dict()


def read_json(path: str) -> dict[str, Any]:
    """Read a JSON object from `path`; a broken file is named in the error.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the text is not a JSON object.
    """
    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
    except ValueError as error:
        raise ValueError(f"'{path}' is not valid JSON ({error}). Download or write it again.") from error
    if not isinstance(values, dict):
        raise ValueError(f"'{path}' should hold a JSON object, but holds a {type(values).__name__}.")
    return values


class DecoderConfig(ModelConfig):
    """What the decoder families share: head counts and the window of each layer."""

    num_key_value_heads: int
    head_dim: int

    def _complete(self) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads

    def window(self, layer: int) -> int | None:
        """Return how many tokens back layer number `layer` may look (itself included), or None for all."""
        return None


class LlamaConfig(DecoderConfig):
    """Llama 1 to 3.x (Touvron et al. 2023, arXiv:2302.13971; Grattafiori et al. 2024, arXiv:2407.21783)."""

    model_type = "llama"
    defaults: ClassVar = {
        **_DECODER,
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        "mlp_bias": False,
        "vocab_size": 32000,
    }


class MistralConfig(DecoderConfig):
    """Mistral (Jiang et al. 2023, arXiv:2310.06825): Llama with a sliding window in every layer."""

    model_type = "mistral"
    defaults: ClassVar = {
        **_DECODER,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "vocab_size": 32000,
    }

    def window(self, layer: int) -> int | None:
        """Every layer has the same window."""
        return self.sliding_window


class Qwen2Config(DecoderConfig):
    """Qwen2 and Qwen2.5 (Yang et al. 2024, arXiv:2407.10671): Llama with biases on q, k and v."""

    layer_types: list[str]

    model_type = "qwen2"
    defaults: ClassVar = {
        **_DECODER,
        "intermediate_size": 22016,
        "layer_types": None,
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "use_sliding_window": False,
        "vocab_size": 151936,
    }

    def _complete(self) -> None:
        super()._complete()
        if not self.use_sliding_window:
            self.sliding_window = None
        if self.layer_types is None:
            full = self.num_hidden_layers if self.sliding_window is None else self.max_window_layers
            self.layer_types = [
                "full_attention" if layer < full else "sliding_attention" for layer in range(self.num_hidden_layers)
            ]

    def window(self, layer: int) -> int | None:
        """`layer_types` tells which layers have the window."""
        return self.sliding_window if self.layer_types[layer] == "sliding_attention" else None


class Qwen3Config(Qwen2Config):
    """Qwen3, dense (Yang et al. 2025, arXiv:2505.09388): RMS norms on the heads of q and k, a free `head_dim`."""

    model_type = "qwen3"
    defaults: ClassVar = {**Qwen2Config.defaults, "attention_bias": False, "head_dim": 128}


class BertConfig(ModelConfig):
    """BERT (Devlin et al. 2018, arXiv:1810.04805)."""

    model_type = "bert"
    defaults: ClassVar = {
        "attention_probs_dropout_prob": 0.1,
        "classifier_dropout": None,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 512,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "pad_token_id": 0,
        "position_embedding_type": "absolute",
        "type_vocab_size": 2,
        "vocab_size": 30522,
    }


class RobertaConfig(BertConfig):
    """RoBERTa (Liu et al. 2019, arXiv:1907.11692): BERT's blocks; positions count from `pad_token_id` + 1."""

    model_type = "roberta"
    defaults: ClassVar = {
        **BertConfig.defaults,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
        "vocab_size": 50265,
    }


class GPT2Config(ModelConfig):
    """GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners")."""

    model_type = "gpt2"
    aliases: ClassVar = {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }
    defaults: ClassVar = {
        "activation_function": "gelu_new",
        "attn_pdrop": 0.1,
        "bos_token_id": 50256,
        "embd_pdrop": 0.1,
        "eos_token_id": 50256,
        "layer_norm_epsilon": 1e-5,
        "n_embd": 768,
        "n_head": 12,
        "n_inner": None,
        "n_layer": 12,
        "n_positions": 1024,
        "reorder_and_upcast_attn": False,
        "resid_pdrop": 0.1,
        "scale_attn_by_inverse_layer_idx": False,
        "scale_attn_weights": True,
        "vocab_size": 50257,
    }


class OPTConfig(ModelConfig):
    """OPT (Zhang et al. 2022, arXiv:2205.01068)."""

    model_type = "opt"
    aliases: ClassVar = {"initializer_range": "init_std"}
    defaults: ClassVar = {
        "_remove_final_layer_norm": False,
        "activation_function": "relu",
        "attention_dropout": 0.0,
        "bos_token_id": 2,
        "do_layer_norm_before": True,
        "dropout": 0.1,
        "enable_bias": True,
        "eos_token_id": 2,
        "ffn_dim": 3072,
        "hidden_size": 768,
        "init_std": 0.02,
        "layer_norm_elementwise_affine": True,
        "layerdrop": 0.0,
        "max_position_embeddings": 2048,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "pad_token_id": 1,
        "vocab_size": 50272,
        "word_embed_proj_dim": None,
    }

    word_embed_proj_dim: int

    def _complete(self) -> None:
        if self.word_embed_proj_dim is None:
            self.word_embed_proj_dim = self.hidden_size


class BloomConfig(ModelConfig):
    """BLOOM (BigScience 2022, arXiv:2211.05100); old files say `n_embed` for `hidden_size`."""

    model_type = "bloom"
    aliases: ClassVar = {
        "n_embed": "hidden_size",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }
    defaults: ClassVar = {
        "apply_residual_connection_post_layernorm": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_dropout": 0.0,
        "hidden_size": 64,
        "layer_norm_epsilon": 1e-5,
        "n_head": 8,
        "n_layer": 2,
        "pretraining_tp": 1,
        "slow_but_exact": False,
        "vocab_size": 250880,
    }


class T5Config(ModelConfig):
    """T5 (Raffel et al. 2019, arXiv:1910.10683); version 1.1 has `feed_forward_proj` "gated-gelu" and untied scores.

    HF's other names for `d_model`, `d_kv`, `num_heads` and `num_layers` read the same settings.
    """

    num_decoder_layers: int

    model_type = "t5"
    aliases: ClassVar = {
        "head_dim": "d_kv",
        "hidden_size": "d_model",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
    }
    defaults: ClassVar = {
        "classifier_dropout": 0.0,
        "d_ff": 2048,
        "d_kv": 64,
        "d_model": 512,
        "decoder_start_token_id": None,
        "dropout_rate": 0.1,
        "eos_token_id": 1,
        "feed_forward_proj": "relu",
        "initializer_factor": 1.0,
        "is_encoder_decoder": True,
        "layer_norm_epsilon": 1e-6,
        "num_decoder_layers": None,
        "num_heads": 8,
        "num_layers": 6,
        "pad_token_id": 0,
        "relative_attention_max_distance": 128,
        "relative_attention_num_buckets": 32,
        "vocab_size": 32128,
    }

    def _complete(self) -> None:
        """Raise a ValueError for a `feed_forward_proj` that is neither an activation nor a gated one."""
        if self.num_decoder_layers is None:
            self.num_decoder_layers = self.num_layers
        kind, dash, self.dense_act_fn = self.feed_forward_proj.rpartition("-")
        self.is_gated_act = kind == "gated"
        if dash and not self.is_gated_act:
            raise ValueError(f"feed_forward_proj is '{self.feed_forward_proj}', not '<activation>' or 'gated-<...>'.")
        if self.feed_forward_proj == "gated-gelu":
            self.dense_act_fn = "gelu_new"  # what the checkpoints that say "gelu" were trained with


class MT5Config(T5Config):
    """mT5 (Xue et al. 2020, arXiv:2010.11934): T5 1.1 with a vocabulary for 101 languages."""

    model_type = "mt5"
    defaults: ClassVar = {
        **T5Config.defaults,
        "d_ff": 1024,
        "decoder_start_token_id": 0,
        "feed_forward_proj": "gated-gelu",
        "num_heads": 6,
        "num_layers": 8,
        "tie_word_embeddings": False,
        "vocab_size": 250112,
    }


_FAMILIES = (
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    GPT2Config,
    OPTConfig,
    BloomConfig,
    BertConfig,
    RobertaConfig,
    T5Config,
    MT5Config,
)
CONFIG_CLASSES = {family.model_type: family for family in _FAMILIES}


def config_class(model_type: str | None) -> type[ModelConfig]:
    """Return the config class of a family.

    Raises:
        ValueError: no such family is built here; the message lists those that are.
    """
    if model_type not in CONFIG_CLASSES:
        raise ValueError(
            f"model_type '{model_type}' is not built in msft_peft.models; supported: {', '.join(CONFIG_CLASSES)}. "
            f"A model from another library (mindnlp, MindFormers) can be given to get_peft_model as it is."
        )
    return CONFIG_CLASSES[model_type]
