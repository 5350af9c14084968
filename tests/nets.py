"""Tiny models of plain Cells, one for each kind of layer and of container. They know nothing of PEFT.

Each has `sample()`, an input for it. Activations are smooth or one-sided, so that no weight saturates them.
"""

from collections import OrderedDict
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, mint, nn, ops
from mindspore.common.initializer import Normal, initializer

from msft_peft.models.attention import attend, attend_beside, heads_first


def floats(*shape: int, dtype: Any = ms.float32, seed: int = 7) -> Tensor:
    """Standard normal numbers, the same each time."""
    return Tensor(np.random.default_rng(seed).standard_normal(shape).astype(np.float32), dtype)


def ids(*shape: int, below: int = 10) -> Tensor:
    return Tensor(np.random.default_rng(7).integers(0, below, shape), ms.int32)


class Dense(nn.Cell):
    """Two `nn.Dense`, the second without a bias."""

    def __init__(self, dtype: Any = ms.float32) -> None:
        super().__init__()
        self.dtype = dtype
        self.lin0 = nn.Dense(6, 8, dtype=dtype)
        self.lin1 = nn.Dense(8, 5, has_bias=False, dtype=dtype)

    def construct(self, x: Tensor) -> Tensor:
        return self.lin1(ops.relu(self.lin0(x)))

    def sample(self) -> Tensor:
        return floats(3, 6, dtype=self.dtype)


class FusedDense(nn.Cell):
    """`nn.Dense` with an activation of its own: a delta belongs before it."""

    def __init__(self, activation: str = "relu") -> None:
        super().__init__()
        self.lin0 = nn.Dense(6, 8, activation=activation)
        self.lin1 = nn.Dense(8, 5, has_bias=False, activation="sigmoid")

    def construct(self, x: Tensor) -> Tensor:
        return self.lin1(self.lin0(x))

    def sample(self) -> Tensor:
        return floats(2, 3, 6)


class MintLinear(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = mint.nn.Linear(6, 8)
        self.lin1 = mint.nn.Linear(8, 5, bias=False)

    def construct(self, x: Tensor) -> Tensor:
        return self.lin1(ops.relu(self.lin0(x)))

    def sample(self) -> Tensor:
        return floats(2, 3, 6)


class Embedding(nn.Cell):
    def __init__(self, dtype: Any = ms.float32) -> None:
        super().__init__()
        self.emb = nn.Embedding(10, 6, embedding_table=initializer(Normal(1.0), (10, 6), dtype))
        self.lin = nn.Dense(6, 4, dtype=dtype)

    def construct(self, x: Tensor) -> Tensor:
        return self.lin(self.emb(x))

    def sample(self) -> Tensor:
        return ids(2, 5)


class MintEmbedding(nn.Cell):
    """`mint.nn.Embedding`, whose forward has no CPU kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = mint.nn.Embedding(10, 6)

    def construct(self, x: Tensor) -> Tensor:
        return self.emb(x)

    def sample(self) -> Tensor:
        return ids(2, 5)


class Tied(nn.Cell):
    """An output head that shares the embedding's table."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(10, 6, embedding_table=Normal(1.0))
        self.lin = nn.Dense(6, 6)
        self.head = nn.Dense(6, 10, has_bias=False)
        self.head.weight = self.emb.embedding_table

    def construct(self, x: Tensor) -> Tensor:
        return self.head(self.lin(self.emb(x)))

    def sample(self) -> Tensor:
        return ids(2, 5)


class Conv(nn.Cell):
    """A convolution in 1, 2 or 3 dimensions, with any of the settings that MindSpore's classes take."""

    def __init__(self, dims: int, channels: tuple[int, int] = (2, 4), kernel: Any = 3, **settings: Any) -> None:
        super().__init__()
        self.shape = (2, channels[0], *(7, 8, 6)[:dims])
        self.conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](*channels, kernel, **settings)

    def construct(self, x: Tensor) -> Tensor:
        return ops.relu(self.conv(x))

    def sample(self) -> Tensor:
        return floats(*self.shape)


class Conv1D(nn.Cell):
    """GPT-2's dense layer as HuggingFace writes it: the weight is (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = Parameter(Tensor(np.random.normal(0, 0.4, (nx, nf)).astype(np.float32)), name="weight")
        self.bias = Parameter(Tensor(np.random.normal(0, 0.4, (nf,)).astype(np.float32)), name="bias")

    def construct(self, x: Tensor) -> Tensor:
        y = ops.matmul(ops.reshape(x, (-1, self.nx)), self.weight) + self.bias
        return ops.reshape(y, (*x.shape[:-1], self.nf))


class Gpt2(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj = Conv1D(8, 6), Conv1D(6, 8)

    def construct(self, x: Tensor) -> Tensor:
        return self.c_proj(ops.relu(self.c_attn(x)))

    def sample(self) -> Tensor:
        return floats(2, 3, 6)


class Attention(nn.Cell):
    """No attention at all, but its names."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.q, self.v = nn.Dense(dim, dim), nn.Dense(dim, dim)

    def construct(self, x: Tensor) -> Tensor:
        return self.q(x) * ops.sigmoid(self.v(x))


class Block(nn.Cell):
    def __init__(self, dim: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm((dim,), epsilon=1e-5)
        self.attn = Attention(dim)
        self.mlp = nn.Dense(dim, dim)

    def construct(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x))
        return self.mlp(ops.relu(x))


class Blocks(nn.Cell):
    """A transformer's skeleton: `layers.N.attn.q`, norms, biases, a head; `config.model_type` as HF models have it."""

    def __init__(self, depth: int = 2, model_type: str | None = None) -> None:
        super().__init__()
        if model_type is not None:
            self.config = {"model_type": model_type}
        self.layers = nn.CellList([Block() for _ in range(depth)])
        self.head = nn.Dense(4, 3)

    def construct(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)

    def sample(self) -> Tensor:
        return floats(2, 3, 4)


class Looking(nn.Cell):
    """An attention that looks at what stands beside the text, where it is given that; `paired` returns a tuple."""

    def __init__(self, dim: int, paired: bool) -> None:
        super().__init__()
        self.paired = paired
        self.queries, self.pair = nn.Dense(dim, dim), nn.Dense(dim, 2 * dim, weight_init=Normal(0.8))
        self.out = nn.Dense(dim, dim, weight_init=Normal(0.8))

    def construct(self, x: Tensor, beside: Any = ()) -> Any:
        q = heads_first(self.queries(x), 2)
        k, v = self.keys_and_values(x)
        y = attend(q, k, v, None)
        if len(beside):
            y = y + attend_beside(q, beside)
        return (self.out(y), k) if self.paired else self.out(y)

    def keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return ops.split(heads_first(self.pair(x), 2), 2, 1)


class LookingBlock(Block):
    def __init__(self, paired: bool) -> None:
        super().__init__()
        self.look = Looking(4, paired)

    def construct(self, x: Tensor) -> Tensor:
        y = self.look(x)
        x = x + (y[0] if self.look.paired else y)
        return x + super().construct(x)


class Reading(Blocks):
    """Blocks with such attentions, `layers.N.look`."""

    def __init__(self, depth: int = 2, paired: bool = False) -> None:
        super().__init__()
        self.layers = nn.CellList([LookingBlock(paired) for _ in range(depth)])


class Sequential(nn.SequentialCell):
    """The model itself is a SequentialCell, with another one inside, of named entries."""

    def __init__(self) -> None:
        inner = nn.SequentialCell(OrderedDict([("up", nn.Dense(6, 8)), ("act", nn.ReLU()), ("down", nn.Dense(8, 4))]))
        super().__init__(nn.Dense(4, 6), nn.GELU(), inner)

    def sample(self) -> Tensor:
        return floats(3, 4)


class Containers(nn.Cell):
    """Layers directly in a CellList and a CellDict."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.CellList([nn.Dense(4, 4), nn.Dense(4, 4)])
        self.named = nn.CellDict({"left": nn.Dense(4, 3), "right": nn.Dense(4, 3)})

    def construct(self, x: Tensor) -> Tensor:
        for layer in self.stack:
            x = ops.relu(layer(x))
        return self.named["left"](x) - self.named["right"](x)

    def sample(self) -> Tensor:
        return floats(3, 4)


class Classifier(nn.Cell):
    """A backbone and a head that is a SequentialCell: what `modules_to_save` is for."""

    def __init__(self, dtype: Any = ms.float32) -> None:
        super().__init__()
        self.dtype = dtype
        self.backbone = nn.Dense(6, 8, dtype=dtype)
        self.classifier = nn.SequentialCell(nn.Dense(8, 6, dtype=dtype), nn.ReLU(), nn.Dense(6, 3, dtype=dtype))

    def construct(self, x: Tensor) -> Tensor:
        return self.classifier(ops.relu(self.backbone(x)))

    def sample(self) -> Tensor:
        return floats(4, 6, dtype=self.dtype)


class Norms(nn.Cell):
    """Parameters of all sorts beside the layers: norms, running averages, one of the model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, has_bias=True)
        self.bn = nn.BatchNorm2d(4)
        self.norm = nn.LayerNorm((5,), epsilon=1e-5)
        self.lin = nn.Dense(5, 5)
        self.scale = Parameter(Tensor(np.full((5,), 1.5, np.float32)), name="scale")

    def construct(self, x: Tensor) -> Tensor:
        y = self.norm(self.bn(self.conv(x)))
        return self.lin(y) * self.scale

    def sample(self) -> Tensor:
        return floats(2, 2, 4, 5)


class OffsetRMSNorm(nn.Cell):
    """A norm of a library's own, that scales by one plus its weight, as Gemma's does."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = Parameter(Tensor(np.full((dim,), 0.3, np.float32)), name="weight")

    def construct(self, x: Tensor) -> Tensor:
        return x * ops.rsqrt(ops.mean(ops.square(x), -1, True) + 1e-6) * (1.0 + self.weight)


class Rms(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.norm = OffsetRMSNorm(6)
        self.lin = nn.Dense(6, 4)

    def construct(self, x: Tensor) -> Tensor:
        return self.lin(self.norm(x))

    def sample(self) -> Tensor:
        return floats(3, 6)


class Loss(nn.Cell):
    """A scalar and nothing else: what `value_and_grad` and `Model` want."""

    def __init__(self, model: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.model = model

    def construct(self, x: Tensor, target: Tensor) -> Tensor:
        return ops.reduce_mean(ops.square(ops.cast(self.model(x), ms.float32) - target))


class Reader(nn.Cell):
    """Reads tokens: attention in one layer with two heads, then scores of every token, or of the whole text.

    It takes what prompt methods need: `inputs_embeds`, and `past_key_values` before its own keys and values.
    """

    def __init__(self, whole: bool = False, dtype: Any = ms.float32) -> None:
        super().__init__()
        self.config = {"vocab_size": 12, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        self.whole = whole
        self.emb = nn.Embedding(12, 8, embedding_table=initializer(Normal(0.8), (12, 8), dtype), dtype=dtype)
        self.qkv = nn.Dense(8, 24, weight_init=Normal(0.6), dtype=dtype)
        self.classifier = nn.Dense(8, 3, weight_init=Normal(0.8), dtype=dtype)

    def construct(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
    ) -> dict[str, Tensor]:
        x = self.emb(input_ids) if inputs_embeds is None else inputs_embeds
        b, t, _ = x.shape
        q, k, v = ops.split(ops.reshape(self.qkv(x), (b, t, 2, 12)).swapaxes(1, 2), 4, -1)
        if past_key_values is not None:
            k, v = ops.concat((past_key_values[0][0], k), 2), ops.concat((past_key_values[0][1], v), 2)
        scores = ops.matmul(q, k.swapaxes(-1, -2))
        if attention_mask is not None:
            scores = scores + (ops.cast(attention_mask, x.dtype).expand_dims(1).expand_dims(1) - 1) * 1e4
        y = ops.reshape(ops.matmul(ops.softmax(scores), v).swapaxes(1, 2), (b, t, 8)) + x
        logits = self.classifier(y.mean(1) if self.whole else y)
        outputs = {"logits": logits}
        if labels is not None:
            chosen = ops.one_hot(ops.maximum(labels, 0), 3)
            counted = ops.cast(labels >= 0, ms.float32).expand_dims(-1)
            outputs["loss"] = -(ops.log_softmax(ops.cast(logits, ms.float32), -1) * chosen * counted).sum()
        return outputs

    def get_input_embeddings(self) -> nn.Cell:
        return self.emb

    def sample(self) -> Tensor:
        return ids(2, 5, below=12)
