"""The nets on torch. Their twins are in cells.py: same attribute names, same sums."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


def swish(x):
    return x * torch.sigmoid(x)


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin0 = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.lin1 = nn.Linear(8, 8, bias=False)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        return self.out(swish(self.lin1(self.norm(swish(self.lin0(x))))))


class DenseActivation(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin0 = nn.Linear(6, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        return self.out(torch.sigmoid(self.lin0(x)))


class MintLinear(DenseActivation):
    pass


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(11, 6)
        self.lin = nn.Linear(6, 4)

    def forward(self, x):
        return self.lin(swish(self.emb(x)))


class Conv1dNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv0 = nn.Conv1d(4, 6, 3, stride=2, padding=1)
        self.conv1 = nn.Conv1d(6, 8, 3, groups=2)
        self.lin = nn.Linear(8, 3)

    def forward(self, x):
        return self.lin(swish(self.conv1(swish(self.conv0(x)))).mean(2))


class Conv2dNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv0 = nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0))
        self.conv1 = nn.Conv2d(6, 8, 3, padding=1, groups=2)
        self.lin = nn.Linear(8, 3)

    def forward(self, x):
        return self.lin(swish(self.conv1(swish(self.conv0(x)))).mean((2, 3)))


class Conv2dSame(nn.Module):
    """Even kernels: one side gets more padding than the other."""

    def __init__(self):
        super().__init__()
        self.conv0 = nn.Conv2d(3, 4, (4, 3), padding="same")
        self.conv1 = nn.Conv2d(4, 3, (2, 5), padding="same")

    def forward(self, x):
        return self.conv1(swish(self.conv0(x))).mean(3)


class Conv2dSquare(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv0 = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.conv1 = nn.Conv2d(4, 3, 1)

    def forward(self, x):
        return self.conv1(swish(self.conv0(x))).mean(3)


class Conv3dNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv0 = nn.Conv3d(4, 6, (2, 3, 3), stride=(1, 2, 1), padding=(1, 1, 0))
        self.conv1 = nn.Conv3d(6, 4, 2, groups=2)

    def forward(self, x):
        return self.conv1(swish(self.conv0(x))).mean((2, 3, 4))


class Gpt2Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_attn = Conv1D(10, 6)
        self.c_proj = Conv1D(5, 10)

    def forward(self, x):
        return self.c_proj(swish(self.c_attn(x)))


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(4, 4)
        self.k_proj = nn.Linear(4, 4)
        self.v_proj = nn.Linear(4, 4, bias=False)

    def forward(self, x):
        return swish(self.q_proj(x)) * torch.sigmoid(self.k_proj(x)) + self.v_proj(x)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln = nn.LayerNorm(4)
        self.attn = Mixer()
        self.up = nn.Linear(4, 6)
        self.down = nn.Linear(6, 4)

    def forward(self, x):
        x = x + self.attn(self.ln(x))
        return x + self.down(swish(self.up(x)))


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(13, 4)
        self.layers = nn.ModuleList([Block() for _ in range(2)])
        self.norm = nn.LayerNorm(4)
        self.classifier = nn.Linear(4, 3)

    def forward(self, x):
        x = self.embed_tokens(x)
        for layer in self.layers:
            x = layer(x)
        return self.classifier(self.norm(x).mean(1))


class Pool(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.zeros(3, 6, 5))
        self.second = nn.Parameter(torch.zeros(3, 5, 4))

    def forward(self, x):
        return torch.bmm(swish(torch.bmm(x, self.first)), self.second)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(6, 3)
        self.pool = Pool()

    def forward(self, x):
        shares = torch.sigmoid(self.gate(x)).T
        return (self.pool(x.expand(3, -1, -1)) * shares.unsqueeze(2)).sum(0)


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
