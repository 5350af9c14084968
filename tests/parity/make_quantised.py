"""Writes quantised.npz with bitsandbytes on torch: `python -m tests.parity.make_quantised`, by hand, from the root.

A weight, and what it is once it was quantised: in blocks of 64 to "nf4", and by rows to "int8".
"""

from pathlib import Path

import numpy as np
import torch
from bitsandbytes import functional


def main() -> None:
    w = np.random.default_rng(5).standard_normal((24, 50)).astype(np.float32)
    blocks, state = functional.quantize_4bit(torch.tensor(w), quant_type="nf4")
    nf4 = functional.dequantize_4bit(blocks, state)
    rows, largest, _ = functional.int8_vectorwise_quant(torch.tensor(w).half())
    int8 = rows.float() * largest[:, None] / 127
    np.savez_compressed(Path(__file__).parent / "quantised.npz", weight=w, nf4=nf4.numpy(), int8=int8.numpy())


if __name__ == "__main__":
    main()
