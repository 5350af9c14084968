"""The numbers that torch's generator on the CPU draws from a seed, without torch.

Some methods keep a seed in their files and not what was drawn from it, so that it must be drawn again to the bit.
"""

import math

import numpy as np

# What torch seeds a generator with that is given no seed.
DEFAULT_SEED = 67280421310721
# From this length on torch permutes in another way, all of which would have to be gone through.
_LONG = (2**32 - 1) // 20


class TorchGenerator:
    """torch.Generator().manual_seed(seed): the Mersenne Twister, and how torch turns its bits into numbers.

    Each call goes on where the one before it stopped, as in torch.

    Args:
        seed: any integer that torch takes; None for torch's default.

    Raises:
        ValueError: a seed that torch does not take.
    """

    def __init__(self, seed: int | None = None) -> None:
        seed = DEFAULT_SEED if seed is None else seed
        if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**64:
            raise ValueError(f"a seed must be an integer in [-2**63, 2**64), got {seed!r}")
        self._twister = np.random.RandomState(seed % 2**32)
        self._spare: float | None = None

    def _bits(self, count: int) -> np.ndarray:
        """(count,): 32 random bits each."""
        return self._twister.randint(0, 2**32, count, dtype=np.uint32)

    def uniform(
        self, shape: tuple[int, ...], low: float = 0.0, high: float = 1.0, bfloat16: bool = False
    ) -> np.ndarray:
        """`Tensor.uniform_`, and `torch.rand`: float32 in [low, high).

        Args:
            shape: what to draw.
            low, high: the bounds.
            bfloat16: draw what a bfloat16 tensor would get; the numbers come as float32.
        """
        units = (self._bits(math.prod(shape)) & (2**24 - 1)) * 2.0**-24
        begin, end = np.asarray(low, np.float32), np.asarray(high, np.float32)
        # Multiplied and added with one rounding at the end, as torch's kernels do on processors of today.
        drawn = (units * (end - begin).astype(np.float64) + begin.astype(np.float64)).astype(np.float32)
        if bfloat16:
            drawn, begin, end = (rounded_to_bfloat16(value) for value in (drawn, begin, end))
        # What rounding brought to the open end goes to the other.
        return np.where(drawn == end, begin, drawn).reshape(shape)

    def normal(self, shape: tuple[int, ...], std: float = 1.0) -> np.ndarray:
        """`torch.normal(0, std)`, float32, to about the last bit: torch's vectorised logarithm and cosine are its own.

        Fewer than 16 numbers are drawn one by one there, from other bits.
        """
        count = math.prod(shape)
        if count < 16:
            drawn = np.array([self._one_normal() for _ in range(count)], np.float64) * std
            return drawn.astype(np.float32).reshape(shape)
        units = self.uniform((count,))
        filled = np.empty(count, np.float32)
        whole = count - count % 16
        filled[:whole] = _box_muller(units[:whole], std)
        if whole < count:
            # The last 16 once more, from new bits.
            filled[-16:] = _box_muller(self.uniform((16,)), std)
        return filled.reshape(shape)

    def _one_normal(self) -> float:
        """One number from N(0, 1); every second one is left over from the draw before."""
        if self._spare is not None:
            spare, self._spare = self._spare, None
            return spare
        first, second = self._double(), self._double()
        radius, angle = math.sqrt(-2.0 * math.log1p(-second)), 2.0 * math.pi * first
        self._spare = radius * math.sin(angle)
        return radius * math.cos(angle)

    def _double(self) -> float:
        """In [0, 1), of 53 random bits."""
        high, low = (int(bits) for bits in self._bits(2))
        return ((high << 32 | low) & (2**53 - 1)) * 2.0**-53

    def permutation(self, length: int, count: int | None = None) -> np.ndarray:
        """`torch.randperm(length)[:count]`, int64, in time and memory that go with `count`.

        Raises:
            NotImplementedError: 214,748,364 or more, of which torch makes another permutation.
        """
        if length >= _LONG:
            raise NotImplementedError(f"a permutation of {length} as torch draws it is not built: at most {_LONG - 1}")
        count = length if count is None else min(count, length)
        # The last of all has no choice, and no number is drawn for it.
        steps = min(count, max(length - 1, 0))
        jumps = (self._bits(steps) % (length - np.arange(steps))).tolist()
        # Fisher-Yates; of the sequence only the places are held that a swap has touched.
        moved: dict[int, int] = {}
        picked = np.empty(count, np.int64)
        for i in range(count):
            j = i + jumps[i] if i < steps else i
            picked[i] = moved.get(j, j)
            here = moved.pop(i, i)
            if j != i:
                moved[j] = here
        return picked


def _box_muller(units: np.ndarray, std: float) -> np.ndarray:
    """Normal numbers from numbers in [0, 1), by eights: of each 16 the first half gives lengths, the second angles."""
    lengths, angles = np.moveaxis(units.reshape(-1, 2, 8).astype(np.float64), 1, 0)
    radius, angle = np.sqrt(-2.0 * np.log(1.0 - lengths)), 2.0 * math.pi * angles
    return (np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1) * std).astype(np.float32).ravel()


def rounded_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Finite float32 numbers, rounded to the nearest that bfloat16 has, ties to even; still float32."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    bits = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return bits.astype(np.uint32).view(np.float32).reshape(np.shape(values))
