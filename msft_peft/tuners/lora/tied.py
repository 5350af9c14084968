"""LoRA of a head that shares the embedding's weight, and its update."""

from typing import Any

from mindspore import Parameter, Tensor, ops

from msft_peft.config import PeftConfig
from msft_peft.core.patch import Reference
from msft_peft.errors import ConfigError
from msft_peft.hosts import Site
from msft_peft.tuners.lora.config import LoraConfig
from msft_peft.tuners.lora.patch import LoraEmbeddingPatch, LoraPatch


class LoraTiedPatch(LoraPatch):
    """The embedding's update E + s·(B·A)ᵀ as a head's: A_head = Bᵀ and B_head = Aᵀ.

    It has no weights of its own. In files it has lora_A (r, dim) and lora_B (vocabulary, r), as in HF.

    Differs: HF has two Parameters in one memory, each of which the optimizer moves; here there is one, with the sum of
    both gradients. They have one scaling too: `scale_layer` and its like at the table change it, and those at the head
    do nothing.
    """

    rides = True
    turned = True

    def __init__(
        self, site: Site, config: PeftConfig, autocast: bool, low_cpu_mem_usage: bool, source: LoraEmbeddingPatch
    ) -> None:
        self.source = Reference(source)
        super().__init__(site, config, autocast, low_cpu_mem_usage)

    def setup(self, site: Site, config: LoraConfig) -> None:
        if config.variant or config.lora_bias or config.init not in (True, False, "gaussian"):
            raise ConfigError(
                "ensure_weight_tying ties plain LoRA only, with init_lora_weights True, False or 'gaussian': at "
                f"{site.path} variant={config.variant!r}, lora_bias={config.lora_bias}, init={config.init!r}."
            )
        self.hyperparameters(site, config)
        if self.r != self.source.cell.r:
            raise ConfigError(
                f"ensure_weight_tying: {site.path} has the rank {self.r} and {self.source.cell.site.path}, to which "
                f"it is tied, {self.source.cell.r}. Give both the same in rank_pattern."
            )
        self.scale = self.source.cell.scale
        self.has_bias = False
        self.keys = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}

    @property
    def lora_A(self) -> Parameter:
        """The table's B (dim, r): in files it is transposed."""
        return self.source.cell.lora_embedding_B

    @property
    def lora_B(self) -> Parameter:
        """The table's A (r, vocabulary): in files it is transposed."""
        return self.source.cell.lora_embedding_A

    def shape_of(self, attribute: str) -> tuple[int, ...]:
        return (self.r, self.site.in_features) if attribute == "lora_A" else (self.site.out_features, self.r)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return ops.add(y, self.update(self.cast(x)))

    def update(self, x: Tensor) -> Tensor:
        source = self.source.cell
        h = self.op(x, ops.transpose(source.lora_embedding_B, (1, 0)))
        return self.op.mix(self.scaled(h), ops.transpose(source.lora_embedding_A, (1, 0)))

    def delta_weight(self) -> Tensor:
        return self.source.cell.delta_weight()

    def merged(self, w: Tensor, b: Any) -> tuple[Tensor, Any]:
        return w, b
