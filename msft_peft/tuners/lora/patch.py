"""LoRA's mathematics: a low-rank product beside the base layer."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import Initializer, Normal

from msft_peft.backend.arrays import as_float32, to_numpy
from msft_peft.backend.tree import Named
from msft_peft.core.patch import Patch, he_uniform
from msft_peft.core.scale import Scale
from msft_peft.core.targets import match_pattern
from msft_peft.errors import ConfigError, MergeError
from msft_peft.hosts import Site
from msft_peft.tuners.lora.config import LoraConfig
from msft_peft.tuners.lora.init import EIGENS, GRADIENT, TITLES, Start, base_weight, start_of


class LoraPatch(Patch):
    """Low-rank update of a dense or convolution layer: y = y₀ + s·B(A(dropout(x))).

    Weights:
        lora_A (r, in) or (r, in, kernel...): He-uniform with a = √5, or see `init`.
        lora_B (out, r) or (out, r / groups, 1...): zeros, so that a fresh adapter is the identity, or see `init`.
        lora_B_bias (out,), with `lora_bias` alone: zeros; y gains s times it.

    Source: Hu et al. 2021, arXiv:2106.09685, §4.1. A convolution's A has the base layer's geometry, B is 1×1.
    Differs: a dilated convolution works here; HF builds A without the dilation and fails in the sum.
    """

    # Whether its update is s·B·A, the product of its two weights.
    factored = True
    # Whether its weights can be padded for higher ranks.
    grows = True
    # What quantisation took from the base weight, in float32; None if it took nothing or the base gives up s·B·A.
    loss: np.ndarray | None = None

    def setup(self, site: Site, config: LoraConfig) -> None:
        self.hyperparameters(site, config)
        if self.r % site.groups:
            raise ConfigError(
                f"{site.path} is a convolution with groups={site.groups}, of which the rank must be a multiple; "
                f"it is {self.r}. Choose another r, or give this layer its own in rank_pattern."
            )
        kernel = site.shape[2:]
        shape_a = (self.r, site.in_features, *kernel)
        shape_b = (site.out_features, self.r // site.groups, *(1 for _ in kernel))
        start = self.start(site, config)
        init_b: Initializer | str = "zeros" if config.init else he_uniform()
        self.lora_A = self.weight("lora_A.weight", shape_a, start.a if start else self.init_of_a(config))
        frozen = config.init == "mica"
        self.lora_B = self.weight("lora_B.weight", shape_b, start.b if start else init_b, fixed=frozen)
        self.counted |= self.fixed
        if start and start.residual:
            self.residual, self.title = True, TITLES[str(config.init).partition("_niter")[0]]
            if start.kept is not None:
                # In the base's own dtype, so that weight and loss add up to the very weight that was there.
                kept = to_numpy(Tensor(start.kept, site.dtype))
                self.loss = base_weight(site) - as_float32(kept)
        if config.lora_bias:
            self.lora_B_bias = self.weight("lora_B.bias", (site.out_features,), "zeros")
        self.has_bias, self.drops = config.lora_bias, config.lora_dropout > 0
        self.lora_dropout = nn.Dropout(p=config.lora_dropout) if config.lora_dropout > 0 else nn.Identity()

    def hyperparameters(self, site: Site, config: LoraConfig) -> None:
        """Rank and scaling of this layer: its own patterns first, then the config's."""
        self.r, self.lora_alpha, scaling = self.settings(config)
        self.scale = Scale(scaling)
        if config.alora_invocation_tokens is not None:
            self.invocation = tuple(config.alora_invocation_tokens)

    def settings(self, config: LoraConfig) -> tuple[int, float, float]:
        """(rank, alpha, scaling) of this layer by the config."""
        r = match_pattern(config.rank_pattern, self.name_in_patterns, config.r)
        alpha = match_pattern(config.alpha_pattern, self.name_in_patterns, config.lora_alpha)
        return r, alpha, alpha / (math.sqrt(r) if config.use_rslora else r)

    def start(self, site: Site, config: LoraConfig) -> Start | None:
        """What the initialisation takes from the base weight, or None."""
        # An SVD of each layer for nothing, where the factors are about to be loaded and the base is left alone.
        loaded = self.undrawn and config.init == "mica"
        return None if loaded else start_of(site, config, self.r, self.scaling)

    @property
    def name_in_patterns(self) -> str:
        """What the config's patterns call this place."""
        return self.site.path

    @property
    def scaling(self) -> Any:
        """The factor in effect: a number, or a Parameter (1,) once it is live."""
        return self.scale.value

    def scaled(self, x: Tensor) -> Tensor:
        """s·x."""
        value = self.scale.value
        # The tie to x: compiled code that returns several things cannot hand a bare Parameter from one of its parts
        # to another, and fails.
        return ops.mul(x, ops.depend(value, x)[:1] if self.scale.live else value)

    def init_of_a(self, config: LoraConfig) -> Initializer:
        return Normal(1 / self.r) if config.init == "gaussian" else he_uniform()

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        # Two thin products instead of one thick; the scaling goes where the tensor is thinnest.
        return self.op.add(y, self.update(self.op.rows(self.lora_dropout(self.cast(x)))))

    def update(self, x: Tensor) -> Tensor:
        """s·(B·A·x + b)."""
        delta = self.op.mix(self.hidden(x), self.lora_B)
        return ops.add(delta, self.per_channel(self.scaled(self.lora_B_bias))) if self.has_bias else delta

    def hidden(self, x: Tensor) -> Tensor:
        """s·A·x."""
        return self.scaled(self.op(x, self.lora_A))

    @property
    def batched_rank(self) -> int:
        own = type(self).after is not LoraPatch.after or self.invocation is not None or self.has_bias
        dense = self.site.kind == "dense" and self.dtype == ms.float32
        return self.room if dense and not own else 0

    def down(self) -> Tensor:
        return self.scaled(self.lora_A)

    def up(self) -> Tensor:
        # Not B itself: compiling a concatenation of bare Parameters takes MindSpore time exponential in their number.
        return ops.transpose(self.lora_B, (1, 0))

    def per_channel(self, values: Tensor) -> Tensor:
        """(out,) -> the shape in which it goes with the layer's outputs."""
        return ops.reshape(values, (-1,) + (1,) * (len(self.site.shape) - 2))

    def merged(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        w = ops.add(w, self.delta_weight())
        return w, b + self.scaled(self.lora_B_bias) if self.has_bias else b

    @property
    def additive(self) -> bool:
        return not self.has_bias

    def remainder(self, w: Tensor) -> Tensor:
        # They have done their work, and are as large as the weight.
        for collected in (GRADIENT, EIGENS):
            self.site.layer.__dict__.pop(collected, None)
        return super().remainder(w) if self.loss is None else ops.sub(w, Tensor(self.loss, w.dtype))

    def regained(self, w: Tensor, given: Mapping[str, np.ndarray]) -> Tensor:
        return super().regained(w, given) if self.loss is None else ops.add(w, Tensor(self.loss, w.dtype))

    def delta_weight(self) -> Tensor:
        b = ops.reshape(self.lora_B, (self.site.out_features, -1))
        a = ops.reshape(self.lora_A, (self.lora_A.shape[0], -1))
        return ops.reshape(self.scaled(ops.matmul(b, a)), self.site.shape)

    # --- room for higher ranks ----------------------------------------------------------------------------------

    # How many updates stand in one weight, see LoraParameterPatch.
    experts: int = 1
    # The axis of each weight that counts ranks.
    _rank_axes: ClassVar[dict[str, int]] = {
        "lora_A": 0,
        "lora_B": 1,
        "lora_embedding_A": 0,
        "lora_embedding_B": 1,
    }

    @property
    def room(self) -> int:
        """The highest rank that the weights as stored can hold."""
        first = next(attribute for attribute in self.keys if self._rank_axes.get(attribute) == 0)
        return getattr(self, first).shape[0] // self.experts

    def shape_at(self, attribute: str, rank: int) -> tuple[int, ...]:
        """The shape of a weight in an adapter of this rank."""
        shape = list(getattr(self, attribute).shape)
        axis = self._rank_axes.get(attribute)
        if axis is not None:
            shape[axis] = rank * self.experts if axis == 0 else rank * self.experts // self.site.groups
        return tuple(shape)

    def shape_of(self, attribute: str) -> tuple[int, ...]:
        return self.shape_at(attribute, self.r)

    def blocks_of(self, attribute: str) -> int:
        # The outputs of A are divided among the groups of B, or among experts.
        return self.site.groups * self.experts if attribute == "lora_A" else 1

    def padded(self, rank: int) -> dict[str, Parameter]:
        """The weights with zeros added up to this rank, as new Parameters."""
        found = {}
        for attribute in self.keys:
            old = getattr(self, attribute)
            shape = self.shape_at(attribute, rank)
            if shape != tuple(old.shape):
                values, blocks = to_numpy(old), self.blocks_of(attribute)
                new = Parameter(Tensor(np.zeros(shape, values.dtype)), name=old.name, requires_grad=old.requires_grad)
                Named("", "", new, tuple(old.shape), blocks).write(values)
                found[attribute] = new
        return found

    def check_mergeable(self) -> None:
        if self.invocation is not None:
            raise MergeError("aLoRA does not support merging: a merged adapter would act on all tokens.")
        if self.has_bias and self.site.bias is None:
            raise MergeError(
                f"Impossible to merge LoRA with lora_bias=True because the base layer {self.site.path} has no bias."
            )
        if self.site.groups > 1:
            raise MergeError(
                f"{self.site.path} is a convolution with groups={self.site.groups}: its low-rank update reads all "
                "input channels, which a grouped weight cannot hold. Keep the adapter unmerged."
            )


class LoraEmbeddingPatch(LoraPatch):
    """Low-rank update of an embedding: E[i] = E₀[i] + s·B·A[:, i].

    Weights:
        lora_embedding_A (r, vocabulary): zeros, so that a fresh adapter is the identity.
        lora_embedding_B (dim, r): N(0, 1).
    """

    def setup(self, site: Site, config: LoraConfig) -> None:
        self.hyperparameters(site, config)
        start = self.start(site, config)
        if config.lora_bias:
            raise ConfigError(f"lora_bias=True is not supported for Embedding: {site.path} is one.")
        self.has_bias = False
        vocabulary, dim = site.shape
        init_a = "zeros" if config.init else Normal(1.0)
        init_b, frozen = start.b if start else Normal(1.0), config.init == "mica"
        self.lora_embedding_A = self.weight("lora_embedding_A", (self.r, vocabulary), init_a)
        self.lora_embedding_B = self.weight("lora_embedding_B", (dim, self.r), init_b, fixed=frozen)
        self.counted |= self.fixed

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return ops.add(y, self.update(x))

    def update(self, x: Tensor) -> Tensor:
        h = self.op(x, ops.transpose(self.lora_embedding_A, (1, 0)))
        return self.op.mix(self.scaled(h), self.lora_embedding_B)

    def delta_weight(self) -> Tensor:
        delta = ops.matmul(self.lora_embedding_B, self.lora_embedding_A)
        return self.scaled(ops.transpose(delta, (1, 0)))
