"""MindPet's delta Cells under MindPet's names: an existing script changes `mindpet` to `msft_peft` in its imports."""

from msft_peft.delta.adapter import AdapterDense, AdapterLayer
from msft_peft.delta.lora import LoRADense
from msft_peft.delta.low_rank_adapter import LowRankAdapterDense, LowRankAdapterLayer
from msft_peft.delta.prefix_layer import PrefixLayer
from msft_peft.delta.ptuning2 import PrefixEncoder
from msft_peft.delta.r_drop import RDropLoss, rdrop_repeat

__all__ = [
    "AdapterDense",
    "AdapterLayer",
    "LoRADense",
    "LowRankAdapterDense",
    "LowRankAdapterLayer",
    "PrefixEncoder",
    "PrefixLayer",
    "RDropLoss",
    "rdrop_repeat",
]
