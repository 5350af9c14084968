"""Adaption prompts (LLaMA-Adapter): trained tokens that the upper layers' attention looks at through a gate."""

from dataclasses import dataclass
from typing import Any

from mindspore import Tensor
from mindspore.common.initializer import Normal

from msft_peft.config import TargetedConfig, check_count
from msft_peft.core.patch import Patch
from msft_peft.core.tuner import Tuner
from msft_peft.errors import ConfigError, MergeError
from msft_peft.hosts import Site
from msft_peft.registry import Method

# What each architecture calls its attention.
_ATTENTIONS = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), "self_attn"),
    "gpt2": "attn",
}


@dataclass
class AdaptionPromptConfig(TargetedConfig):
    """Settings of adaption prompts.

    Args:
        target_modules: the name of the attention in each block, or a list or regex as in other methods; by default
            what the architecture calls it.
        adapter_len: tokens of a layer; must be given.
        adapter_layers: how many layers have them, counted from the last; must be given.

    Raises:
        ConfigError: a number that is none.

    Source: Zhang et al. 2023, arXiv:2303.16199.
    Differs: works for Qwen2 and Qwen3 too, and for home-made models, see `models.attention.attend_beside`. HF keeps
        the weights in the base model's dtype, here they are in float32 unless told otherwise. Where the projection of
        the attention's outputs has a bias, HF adds it twice, so that a fresh adapter changes the model.
    """

    beyond_hf = ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")

    peft_type: str | None = "ADAPTION_PROMPT"
    adapter_len: int | None = None
    adapter_layers: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("adapter_len", self.adapter_len)
        check_count("adapter_layers", self.adapter_layers)
        if isinstance(self.target_modules, str) and self.target_modules.isidentifier():
            self.target_modules = [self.target_modules]

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data; one name alone as HF has it, which knows no lists here."""
        fields = super().to_dict()
        names = fields["target_modules"]
        return fields | {"target_modules": names[0] if isinstance(names, list) and len(names) == 1 else names}

    @property
    def is_adaption_prompt(self) -> bool:
        return True


class AdaptionPromptPatch(Patch):
    """y = W_o·(softmax(q·Kᵀ/√D)·V + g·softmax(q·K_pᵀ/√D)·V_p), with K_p, V_p = W_k·P, W_v·P with no positions.

    In GPT-2 the second term is added to the projected first one, as in HF.

    Weights:
        adaption_prompt (1, P, H): normal.
        adaption_gate (1,): g, zero.
    """

    def setup(self, site: Site, config: AdaptionPromptConfig) -> None:
        shape = (1, config.adapter_len or 0, site.in_features)
        self.adaption_gate = self.weight("adaption_gate", (1,), "zeros")
        self.adaption_prompt = self.weight("adaption_prompt", shape, Normal(1.0))

    def tokens(self) -> Tensor:
        """P (1, P, H): hidden states of which the attention makes keys and values."""
        return self.adaption_prompt

    def gate(self) -> Tensor:
        """g (1,)."""
        return self.adaption_gate

    def merged(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        self.check_mergeable()
        return w, b

    def check_mergeable(self) -> None:
        raise MergeError("Tokens that an attention looks at cannot be merged into a weight.")


def choose(config: AdaptionPromptConfig, found: list[str]) -> list[str]:
    """The attentions of the last `adapter_layers` blocks.

    Raises:
        ConfigError: a number is missing, or there are not so many.
    """
    for name in ("adapter_len", "adapter_layers"):
        if getattr(config, name) is None:
            raise ConfigError(f"AdaptionPromptConfig needs {name}: tokens of a layer, and in how many layers.")
    count = config.adapter_layers or 0
    if len(found) < count:
        raise ConfigError(f"Config specifies more adapter layers '{count}' than the model has '{len(found)}'.")
    return found[-count:]


class AdaptionPromptModel(Tuner):
    """The base model with adaption prompts in it, and the switches over them."""


METHOD = Method(
    config=AdaptionPromptConfig,
    tuner=AdaptionPromptModel,
    patches={"attention": AdaptionPromptPatch},
    default_targets={key: [name] for key, name in _ATTENTIONS.items()},
    choose=choose,
    merges=False,
)
