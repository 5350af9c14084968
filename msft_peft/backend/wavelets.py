"""Wavelets: the low-pass filters that put a signal together again from its coefficients."""

import math

import numpy as np

# Which roots of a symlet, by their size, lie outside the unit circle, so that its phase is closest to a linear one;
# none do for sym2 and sym3. A root stands for its conjugate too.
_OUTSIDE: dict[int, tuple[int, ...]] = {
    **{2: (), 3: (), 4: (1,), 5: (0,), 6: (0, 2), 7: (0,), 8: (1, 3), 9: (1, 2), 10: (0, 2, 4)},
}
# Coiflets, with the sum 1. That of coif4 should be, and is not: these are HF's numbers, which its files go with.
_COIFLETS = {
    "coif1": (
        -0.0514297284708,
        0.238929728471,
        0.602859456942,
        0.272140543058,
        -0.0514297284708,
        -0.0110702715292,
    ),
    "coif2": (
        0.0115875967387,
        -0.0293201379835,
        -0.047639590311,
        0.273021046535,
        0.574682393857,
        0.294867193696,
        -0.0540856070917,
        -0.0420264804608,
        0.0167444101633,
        0.00396788361296,
        -0.00128920335614,
        -0.000509505399108,
    ),
    "coif3": (
        -0.00268241867092,
        0.00550312670783,
        0.0165835604792,
        -0.0465077644787,
        -0.0432207635602,
        0.286503335274,
        0.56128525687,
        0.302983571773,
        -0.0507701407549,
        -0.0581962507616,
        0.0244340943212,
        0.011229240962,
        -0.00636960101105,
        -0.00182045891557,
        0.000790205100958,
        0.000329665173793,
        -5.01927745533e-05,
        -2.44657342553e-05,
    ),
    "coif4": (
        0.000630961211431,
        -0.00115222514377,
        -0.00519452516347,
        0.0113609308998,
        0.0189450610456,
        -0.0517198437058,
        -0.0344861404709,
        0.302272510537,
        0.554547906241,
        0.307917668025,
        -0.0435250092813,
        -0.0648879509714,
        0.0198807736482,
        0.0176389478713,
        -0.00736605484717,
        -0.00231243230766,
        0.00142600634423,
        0.000466698463554,
        -0.000127000784239,
        -0.000113053636979,
        3.04836487968e-05,
        1.26674480893e-05,
        -1.58492658076e-06,
        -1.12394808828e-06,
    ),
}
# The filters that there are, and others whose names HF's configs take, though its layers then fail.
FAMILIES = (*(f"db{n}" for n in range(1, 11)), *(f"sym{n}" for n in _OUTSIDE), *_COIFLETS)
NAMES = (
    *(f"db{n}" for n in range(1, 39)),
    *(f"sym{n}" for n in range(2, 21)),
    *(f"coif{n}" for n in range(1, 18)),
)


def low_pass(family: str) -> np.ndarray:
    """The filter h (2n,) of one of `FAMILIES`: its sum is √2, and it stands at a right angle to its shifts by two.

    Daubechies' and the symlets' are (1 + z)ⁿ·Π(z - z_k), normalised: of the roots z and 1/z that belong to each root
    of Σ_k C(n-1+k, k)·yᵏ, y = (2 - z - 1/z) / 4, one is taken.

    Source: Daubechies 1992, Ten Lectures on Wavelets, §6.1, §8.1; coiflets: §8.2.
    """
    if family in _COIFLETS:
        return np.array(_COIFLETS[family]) * math.sqrt(2)
    n = int(family.lstrip("dbsym"))
    y = np.roots([math.comb(n - 1 + k, k) for k in reversed(range(n))]).astype(complex)
    z = 1 - 2 * y + np.sqrt((1 - 2 * y) ** 2 - 1)
    z = np.where(abs(z) < 1, z, 1 / z)
    z = z[z.imag > -1e-9]
    z = z[np.argsort(abs(z))]
    outside = list(_OUTSIDE[n]) if family.startswith("sym") else []
    z[outside] = 1 / z[outside]
    h = np.poly([*[-1.0] * n, *z, *z[abs(z.imag) > 1e-9].conj()]).real
    return h * (math.sqrt(2) / h.sum())


def high_pass(h: np.ndarray) -> np.ndarray:
    """The filter of the details beside a low-pass one: reversed, with every other sign turned."""
    return h[::-1] * (-1.0) ** np.arange(len(h))
