"""LoRA on a parameter itself, for modules that are no layers: a mixture's experts in one stack of matrices."""

from mindspore import Tensor, ops

from msft_peft.backend.tree import torch_name
from msft_peft.core.patch import he_uniform
from msft_peft.errors import ConfigError
from msft_peft.hosts import Site
from msft_peft.tuners.lora.config import LoraConfig
from msft_peft.tuners.lora.init import start_of
from msft_peft.tuners.lora.patch import LoraPatch

# What must be as in plain LoRA.
_PLAIN = {
    "lora_dropout": 0.0,
    "use_dora": False,
    "lora_bias": False,
    "fan_in_fan_out": False,
    "alora_invocation_tokens": None,
    "kasa_config": None,
    "use_bdlora": None,
    "velora_config": None,
    "monteclora_config": None,
    "arrow_config": None,
}


class LoraParameterPatch(LoraPatch):
    """Low-rank update of a matrix, or of each matrix in a stack: W'[e] = W[e] + s·B[e]·A[e].

    Weights, for a parameter (experts, out, in) (or (out, in), with one expert):
        lora_A (r·experts, in): experts one after the other.
        lora_B (out, r·experts): experts take turns.

    Source: HF peft's `target_parameters`.
    """

    def setup(self, site: Site, config: LoraConfig) -> None:
        for name, plain in _PLAIN.items():
            value = getattr(config, name)
            if value != plain:
                raise ConfigError(f"target_parameters does not work with {name}={value!r}: {site.path}")
        if config.init == "mica":
            raise ConfigError(f"target_parameters does not work with init_lora_weights='mica': {site.path}")
        if len(site.shape) not in (2, 3):
            raise ConfigError(
                f"target_parameters: {site.path}.{site.weight_name} has the shape {site.shape}, but only matrices and "
                "stacks of matrices (2 or 3 dimensions) can have a low-rank update."
            )
        self.hyperparameters(site, config)
        start_of(site, config, self.r, self.scaling)  # says what it does not do here
        self.experts = site.shape[0] if len(site.shape) == 3 else 1
        rank = self.r * self.experts
        self.lora_A = self.weight("lora_A.weight", (rank, site.in_features), self.init_of_a(config))
        self.lora_B = self.weight("lora_B.weight", (site.out_features, rank), "zeros" if config.init else he_uniform())
        self.has_bias = False

    @property
    def name_in_patterns(self) -> str:
        """The parameter's own path, by which several in one module are told apart."""
        return f"{self.site.path}.{torch_name(self.site.layer, self.site.weight_name)}"

    def delta_weight(self) -> Tensor:
        rank = self.lora_A.shape[0] // self.experts
        a = ops.reshape(self.lora_A, (self.experts, rank, -1))
        b = ops.transpose(ops.reshape(self.lora_B, (-1, rank, self.experts)), (2, 0, 1))
        return ops.reshape(self.scaled(ops.bmm(b, a)), self.site.shape)
