"""The activations that transformers knows by name, in forms that are exact and fast on CPU."""

from collections.abc import Callable

from mindspore import Tensor, nn, ops


def silu(x: Tensor) -> Tensor:
    """x·σ(x)."""
    return x * ops.sigmoid(x)


_PHI = (
    1.595768536783099,
    0.07266829831517933,
    -6.605345638266933e-05,
    -0.00011054675839814526,
    7.948139555129396e-06,
    -2.675662810256628e-07,
    3.627852001069511e-09,
)


def normal_cdf(x: Tensor) -> Tensor:
    """Φ(x), the normal distribution function, as σ(x·p(x²)).

    p is the polynomial of degree 6 that fits the log odds of Φ best: the error of x·Φ(x) is below 1e-7 for every x,
    and the cost on CPU a third of that of `ops.erf`.
    """
    square = x * x
    p = square * _PHI[6] + _PHI[5]
    for i in (4, 3, 2, 1, 0):
        p = p * square + _PHI[i]
    return ops.sigmoid(x * p)


class GELU(nn.Cell):
    """x·Φ(x), exactly, with the derivative Φ(x) + x·φ(x) (Hendrycks & Gimpel 2016, arXiv:1606.08415)."""

    def construct(self, x: Tensor) -> Tensor:
        """Map `x` (...) to (...)."""
        return x * normal_cdf(x)

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        """Return the gradient of `x`."""
        density = ops.exp(x * x * -0.5) * 0.3989422804014327
        return (dout * (normal_cdf(x) + x * density),)


def gelu_tanh(x: Tensor) -> Tensor:
    """x·σ(2√(2/π)·(x + 0.044715·x³)): the tanh form of GELU, through the faster and more exact sigmoid."""
    return x * ops.sigmoid(x * (1.5957691216057308 + 0.07135481282553484 * x * x))


def tanh(x: Tensor) -> Tensor:
    """2·σ(2x) - 1; MindSpore's own tanh on CPU is off by up to 1e-4."""
    return 2.0 * ops.sigmoid(2.0 * x) - 1.0


def mish(x: Tensor) -> Tensor:
    """x·tanh(log(1 + eˣ)) (Misra 2019, arXiv:1908.08681)."""
    return x * tanh(ops.relu(x) + ops.log(1.0 + ops.exp(-ops.abs(x))))


def quick_gelu(x: Tensor) -> Tensor:
    """x·σ(1.702·x)."""
    return x * ops.sigmoid(1.702 * x)


def clipped_gelu(x: Tensor) -> Tensor:
    """GELU, kept within ±10."""
    return ops.clamp(_GELU(x), -10.0, 10.0)


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)²."""
    return ops.square(ops.relu(x))


def laplace(x: Tensor) -> Tensor:
    """The normal distribution function of mean √½ and deviation 0.282095 (Ma et al. 2022, arXiv:2209.10655)."""
    return normal_cdf((x - 0.707107) / 0.282095)


def leaky(slope: float) -> Callable[[Tensor], Tensor]:
    """max(x, 0) + slope·min(x, 0)."""

    def function(x: Tensor) -> Tensor:
        return ops.relu(x) - slope * ops.relu(-x)

    return function


def xielu(x: Tensor) -> Tensor:
    """α·x² + x/2 for x > 0, α·(eˣ - 1 - x) + x/2 below, α as it begins in bfloat16 (arXiv:2411.13010)."""
    below = ops.exp(ops.minimum(x, 0.0)) - 1.0 - x
    return 0.80078125 * ops.where(x > 0, x * x, below) + 0.5 * x


def linear(x: Tensor) -> Tensor:
    """Return x."""
    return x


_GELU = GELU()
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **dict.fromkeys(("gelu", "gelu_python"), _GELU),
    "gelu_10": clipped_gelu,
    **dict.fromkeys(
        ("gelu_accurate", "gelu_fast", "gelu_new", "gelu_python_tanh", "gelu_pytorch_tanh"),
        gelu_tanh,
    ),
    "laplace": laplace,
    "leaky_relu": leaky(0.01),
    "linear": linear,
    "mish": mish,
    # Not trained: transformers makes it anew each time.
    "prelu": leaky(0.25),
    "quick_gelu": quick_gelu,
    "relu": ops.relu,
    "relu2": squared_relu,
    "relu6": ops.relu6,
    "sigmoid": ops.sigmoid,
    **dict.fromkeys(("silu", "swish"), silu),
    "tanh": tanh,
    "xielu": xielu,
}
