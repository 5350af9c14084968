"""The nets on MindSpore. Their twins are in modules.py: same attribute names, same sums."""

import mindspore as ms
import numpy as np
from mindspore import Parameter, mint, nn, ops


def swish(x):
    return x * ops.sigmoid(x)


class Mlp(nn.Cell):
    def __init__(self):
        super().__init__()
        self.lin0 = nn.Dense(6, 8)
        self.norm = nn.LayerNorm((8,), epsilon=1e-5)
        self.lin1 = nn.Dense(8, 8, has_bias=False)
        self.out = nn.Dense(8, 3)

    def construct(self, x):
        return self.out(swish(self.lin1(self.norm(swish(self.lin0(x))))))


class DenseActivation(nn.Cell):
    """A `nn.Dense` that applies its activation itself: the adapter's part must go in before it."""

    def __init__(self):
        super().__init__()
        self.lin0 = nn.Dense(6, 8, activation="sigmoid")
        self.out = nn.Dense(8, 3)

    def construct(self, x):
        return self.out(self.lin0(x))


class MintLinear(nn.Cell):
    def __init__(self):
        super().__init__()
        self.lin0 = mint.nn.Linear(6, 8)
        self.out = mint.nn.Linear(8, 3)

    def construct(self, x):
        return self.out(ops.sigmoid(self.lin0(x)))


class Table(nn.Cell):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(11, 6)
        self.lin = nn.Dense(6, 4)

    def construct(self, x):
        return self.lin(swish(self.emb(x)))


class Conv1dNet(nn.Cell):
    def __init__(self):
        super().__init__()
        self.conv0 = nn.Conv1d(4, 6, 3, stride=2, pad_mode="pad", padding=1, has_bias=True)
        self.conv1 = nn.Conv1d(6, 8, 3, pad_mode="valid", group=2, has_bias=True)
        self.lin = nn.Dense(8, 3)

    def construct(self, x):
        return self.lin(swish(self.conv1(swish(self.conv0(x)))).mean(2))


class Conv2dNet(nn.Cell):
    def __init__(self):
        super().__init__()
        self.conv0 = nn.Conv2d(4, 6, (3, 2), stride=(2, 1), pad_mode="pad", padding=(1, 1, 0, 0), has_bias=True)
        self.conv1 = nn.Conv2d(6, 8, 3, pad_mode="same", group=2, has_bias=True)
        self.lin = nn.Dense(8, 3)

    def construct(self, x):
        return self.lin(swish(self.conv1(swish(self.conv0(x)))).mean((2, 3)))


class Conv2dSame(nn.Cell):
    """Even kernels: one side gets more padding than the other."""

    def __init__(self):
        super().__init__()
        self.conv0 = nn.Conv2d(3, 4, (4, 3), pad_mode="same", has_bias=True)
        self.conv1 = nn.Conv2d(4, 3, (2, 5), pad_mode="pad", padding=(0, 1, 2, 2), has_bias=True)

    def construct(self, x):
        return self.conv1(swish(self.conv0(x))).mean(3)


class Conv2dSquare(nn.Cell):
    """What HF's HRA and OFT can work on: square kernels, and for OFT a kernel of one."""

    def __init__(self):
        super().__init__()
        self.conv0 = nn.Conv2d(3, 4, 3, stride=2, pad_mode="pad", padding=1, has_bias=True)
        self.conv1 = nn.Conv2d(4, 3, 1, has_bias=True)

    def construct(self, x):
        return self.conv1(swish(self.conv0(x))).mean(3)


class Conv3dNet(nn.Cell):
    def __init__(self):
        super().__init__()
        sides = (1, 1, 1, 1, 0, 0)
        self.conv0 = nn.Conv3d(4, 6, (2, 3, 3), stride=(1, 2, 1), pad_mode="pad", padding=sides, has_bias=True)
        self.conv1 = nn.Conv3d(6, 4, 2, pad_mode="valid", group=2, has_bias=True)

    def construct(self, x):
        return self.conv1(swish(self.conv0(x))).mean((2, 3, 4))


class Conv1D(nn.Cell):
    """GPT-2's linear layer with the weight stored as (in, out), as ports of it to MindSpore have it."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = Parameter(ms.Tensor(np.zeros((nx, nf), np.float32)))
        self.bias = Parameter(ms.Tensor(np.zeros((nf,), np.float32)))

    def construct(self, x):
        return ops.matmul(x, self.weight) + self.bias


class Gpt2Net(nn.Cell):
    def __init__(self):
        super().__init__()
        self.c_attn = Conv1D(10, 6)
        self.c_proj = Conv1D(5, 10)

    def construct(self, x):
        return self.c_proj(swish(self.c_attn(x)))


class Mixer(nn.Cell):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Dense(4, 4)
        self.k_proj = nn.Dense(4, 4)
        self.v_proj = nn.Dense(4, 4, has_bias=False)

    def construct(self, x):
        return swish(self.q_proj(x)) * ops.sigmoid(self.k_proj(x)) + self.v_proj(x)


class Block(nn.Cell):
    def __init__(self):
        super().__init__()
        self.ln = nn.LayerNorm((4,), epsilon=1e-5)
        self.attn = Mixer()
        self.up = nn.Dense(4, 6)
        self.down = nn.Dense(6, 4)

    def construct(self, x):
        x = x + self.attn(self.ln(x))
        return x + self.down(swish(self.up(x)))


class Blocks(nn.Cell):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(13, 4)
        self.layers = nn.CellList([Block() for _ in range(2)])
        self.norm = nn.LayerNorm((4,), epsilon=1e-5)
        self.classifier = nn.Dense(4, 3)

    def construct(self, x):
        x = self.embed_tokens(x)
        for layer in self.layers:
            x = layer(x)
        return self.classifier(self.norm(x).mean(1))


class Pool(nn.Cell):
    """Three experts, each two matrices in a stack."""

    def __init__(self):
        super().__init__()
        self.first = Parameter(ms.Tensor(np.zeros((3, 6, 5), np.float32)), name="first")
        self.second = Parameter(ms.Tensor(np.zeros((3, 5, 4), np.float32)), name="second")

    def construct(self, x):
        return ops.bmm(swish(ops.bmm(x, self.first)), self.second)


class Experts(nn.Cell):
    """All experts, mixed by a gate."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Dense(6, 3)
        self.pool = Pool()

    def construct(self, x):
        shares = ops.transpose(ops.sigmoid(self.gate(x)), (1, 0))
        every = self.pool(ops.tile(ops.expand_dims(x, 0), (3, 1, 1)))
        return (every * ops.expand_dims(shares, 2)).sum(0)


NETS = {
    "mlp": Mlp,
    "dense_activation": DenseActivation,
    "mint_linear": MintLinear,
    "embedding": Table,
    "conv1d": Conv1dNet,
    "conv2d": Conv2dNet,
    "conv2d_same": Conv2dSame,
    "conv2d_square": Conv2dSquare,
    "conv3d": Conv3dNet,
    "gpt2": Gpt2Net,
    "blocks": Blocks,
    "experts": Experts,
}
