"""DoRA: LoRA turns the rows of a weight, and a learned magnitude says how long they are."""

import numpy as np
from mindspore import Tensor, ops

from msft_peft.backend.arrays import as_float32, to_numpy
from msft_peft.hosts import Site
from msft_peft.tuners.lora.config import LoraConfig
from msft_peft.tuners.lora.init import base_weight
from msft_peft.tuners.lora.patch import LoraEmbeddingPatch, LoraPatch


class DoraPatch(LoraPatch):
    """Weight-decomposed update: W' = m · (W + s·B·A) / ‖W + s·B·A‖, by rows (one for each output).

    The norm counts as a constant in the gradient (§4.3). With dropout, x is dropped where the update meets it and
    where the rescaled base weight does, as in HF.

    Weights: those of LoRA, and
        lora_magnitude_vector (out,), (1, out, 1...) for a convolution: the rows' norms, so that a fresh adapter is the
            identity.

    Source: Liu et al. 2024, arXiv:2402.09353, §4.
    Differs: HF forms W + s·B·A in every pass to measure it. Here, row by row, ‖W + s·B·A‖² = ‖W‖² + 2s·(W·Aᵀ)·B +
    s²·B·(A·Aᵀ)·B, so that no second matrix of W's size is made.
    """

    reads_base = True

    def setup(self, site: Site, config: LoraConfig) -> None:
        super().setup(site, config)
        self.biased = site.bias is not None
        spatial = (1,) * (len(site.shape) - 2)
        self._set_magnitude((1, site.out_features, *spatial) if spatial else (site.out_features,))

    def _set_magnitude(self, shape: tuple[int, ...]) -> None:
        if self.residual:  # of the base as it will be, with the update: for all but LoftQ the base as it is
            w = base_weight(self.site)
            if self.loss is not None:
                w = w - self.loss + as_float32(to_numpy(self.delta_weight()))
            norms = np.linalg.norm(w, axis=1)
        else:
            norms = as_float32(to_numpy(self.norm()))
        self.lora_magnitude_vector = self.weight("lora_magnitude_vector", shape, norms.reshape(shape))

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """(W, A, B) as matrices (out, in), (r, in), (out, r)."""
        w = ops.reshape(self.base_weight(), (self.site.out_features, -1))
        rank = self.lora_A.shape[0]
        return w, ops.reshape(self.lora_A, (rank, -1)), ops.reshape(self.lora_B, (-1, rank))

    def norm(self) -> Tensor:
        """(out,): the lengths of the rows of W + s·B·A."""
        w, a, b = self.factors()
        transposed = ops.transpose(a, (1, 0))
        squares = ops.reduce_sum(ops.square(w), 1)
        cross = ops.reduce_sum(ops.mul(ops.matmul(w, transposed), b), 1)
        own = ops.reduce_sum(ops.mul(ops.matmul(b, ops.matmul(a, transposed)), b), 1)
        # Rounding may bring the square of a row that is nearly zero below it.
        total = ops.relu(ops.add(squares, ops.add(self.scaled(2 * cross), self.scaled(self.scaled(own)))))
        return ops.sqrt(ops.stop_gradient(total))

    def stretch(self) -> Tensor:
        """(out,): what the rows of W + s·B·A are multiplied with."""
        return ops.div(ops.reshape(self.lora_magnitude_vector, (-1,)), self.norm())

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        x, stretch = self.cast(x), self.per_channel(self.stretch())
        if self.training and self.drops:
            x = self.lora_dropout(x)
            linear = self.op(x, self.base_weight())
        else:
            linear = ops.sub(y, self.per_channel(self.site.layer.bias)) if self.biased else y
        return ops.add(y, ops.add(ops.mul(linear, stretch - 1), ops.mul(self.update(x), stretch)))

    def merged(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return ops.mul(self.per_row(self.stretch()), ops.add(w, self.delta_weight())), b

    def per_row(self, values: Tensor) -> Tensor:
        """(out,) -> the shape in which it goes with the weight."""
        return ops.reshape(values, (-1,) + (1,) * (len(self.site.shape) - 1))

    @property
    def additive(self) -> bool:
        return False


class DoraEmbeddingPatch(LoraEmbeddingPatch, DoraPatch):
    """DoRA of an embedding, whose columns (one for each dimension) are turned and measured.

    Weights: those of LoRA, and
        lora_magnitude_vector (dim,): the columns' norms.
    """

    def setup(self, site: Site, config: LoraConfig) -> None:
        LoraEmbeddingPatch.setup(self, site, config)
        self._set_magnitude((site.out_features,))

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        return ops.transpose(self.base_weight(), (1, 0)), self.lora_embedding_A, self.lora_embedding_B

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return ops.mul(ops.add(y, self.update(x)), self.stretch())

    def per_row(self, values: Tensor) -> Tensor:
        return ops.reshape(values, (1, -1))
