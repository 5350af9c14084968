"""VB-LoRA: the rows and columns of all low-rank factors are mixed from one bank of vectors."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from mindspore import Parameter, Tensor, ops
from mindspore.common.initializer import Normal, Uniform

from msft_peft.backend.arrays import to_numpy
from msft_peft.config import TargetedConfig, check_bias, check_finite, check_positive, check_probability
from msft_peft.core.adapter import adapter_in
from msft_peft.core.patch import Shared
from msft_peft.core.tuner import Tuner
from msft_peft.errors import ConfigError, LoadError
from msft_peft.hosts import Site
from msft_peft.registry import Method
from msft_peft.tuners.architectures import VBLORA
from msft_peft.tuners.low_rank import LowRankPatch

_BANK, _LOGITS = "vblora_vector_bank", "vblora_logits_"
_INDICES, _WEIGHTS = "_topk_indices", "_topk_weights"
_INCOMPLETE = (
    "A file that was saved with save_only_topk_weights=True lacks most logits and is for inference only. Training can "
    "go on from the adapter_model.ckpt that msft_peft writes beside it: move the safetensors file away and load again."
)
# The least dtype that HF stores indices in, by the number of vectors that it is for.
_INDEX_DTYPES = ((2**8, np.uint8), (2**15, np.int16), (2**31, np.int32))


@dataclass
class VBLoRAConfig(TargetedConfig):
    """Settings of VB-LoRA.

    Args:
        r: rank.
        num_vectors: vectors in the bank.
        vector_length: length of each; it must divide a layer's inputs and outputs.
        topk: how many vectors are mixed into one part of a factor.
        save_only_topk_weights: keep in the safetensors file which vectors were chosen and their shares, not the
            logits: much smaller, and for inference only. The checkpoint beside has the logits all the same.
        vblora_dropout: dropout of the update's input.
        fan_in_fan_out: the target layers store (in, out), as GPT-2's `Conv1D`; corrected with a warning if wrong.
        bias: "none", "all" or "vblora_only": which biases of the base model are trained.
        init_vector_bank_bound: the bank is drawn from [-bound, bound].
        init_logits_std: the logits are drawn from N(0, std²).
        target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save: see `TargetedConfig`.

    Raises:
        ConfigError: a value out of range, or more vectors to mix than there are.

    Source: Li et al. 2024, arXiv:2405.15179, §3.
    Differs: what `save_only_topk_weights` wrote is refused where it is loaded to be trained, or made trainable; HF
        refuses the first forward pass in training mode.
    """

    peft_type: str | None = "VBLORA"
    r: int = 4
    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    save_only_topk_weights: bool = False
    vblora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_vector_bank_bound: float = 0.02
    init_logits_std: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("r", "num_vectors", "vector_length", "topk"):
            check_positive(name, getattr(self, name))
        if self.topk > self.num_vectors:
            raise ConfigError(f"`topk` ({self.topk}) must not be larger than `num_vectors` ({self.num_vectors})")
        for name in ("init_vector_bank_bound", "init_logits_std"):
            check_finite(name, getattr(self, name))
        check_probability("vblora_dropout", self.vblora_dropout)
        check_bias(self.bias, "vblora")


class VectorBank(Shared):
    """The vectors that all layers of one adapter mix.

    Weights:
        vblora_vector_bank (vectors, length): uniform.
    """

    def setup(self, sites: list[Site], config: VBLoRAConfig) -> None:
        shape = (config.num_vectors, config.vector_length)
        self.vblora_vector_bank = self.weight(_BANK, shape, Uniform(config.init_vector_bank_bound))


class VBLoRAPatch(LowRankPatch):
    """ΔW = B·A, each part of a row of A or a column of B a mixture of the k bank vectors whose logits are highest.

    Weights, drawn from N(0, init_logits_std):
        vblora_logits_A (r, in / length, vectors).
        vblora_logits_B (out / length, r, vectors).
    """

    def setup(self, site: Site, config: VBLoRAConfig) -> None:
        self.r, self.topk, self.dropout = config.r, config.topk, self.dropped(config.vblora_dropout)
        parts = {}
        for what, size in (("in_features", site.in_features), ("out_features", site.out_features)):
            parts[what], rest = divmod(size, config.vector_length)
            if rest:
                raise ConfigError(
                    f"`{what}` {size} must be divisible by `vector_length` {config.vector_length}: at {site.path}"
                )
        init, vectors = Normal(config.init_logits_std), config.num_vectors
        self.vblora_logits_A = self.weight(_LOGITS + "A", (self.r, parts["in_features"], vectors), init)
        self.vblora_logits_B = self.weight(_LOGITS + "B", (parts["out_features"], self.r, vectors), init)

    def untrainable(self) -> str:
        cut = any(np.isneginf(to_numpy(p)).any() for p in (self.vblora_logits_A, self.vblora_logits_B))
        return _INCOMPLETE if cut else ""

    def factors(self) -> tuple[Tensor, Tensor]:
        a, b = self.mixed(self.vblora_logits_A), self.mixed(self.vblora_logits_B)
        columns = ops.reshape(ops.transpose(b, (0, 2, 1)), (self.site.out_features, self.r))
        return columns, ops.reshape(a, (self.r, self.site.in_features))

    def mixed(self, logits: Parameter) -> Tensor:
        """(m, n, length): for each of (m, n, vectors) logits the mixture of the vectors whose logits are highest."""
        highest, indices = ops.topk(logits, self.topk, dim=-1)
        vectors = ops.gather(ops.cast(self.shared.vblora_vector_bank, self.dtype), indices, 0)
        if self.topk == 1:
            # Its share is one. And a process whose first gradient of a softmax is over one number gets all later ones
            # wrong in PyNative (MindSpore 2.10.0, CPU).
            return vectors[:, :, 0]
        return ops.reduce_sum(ops.mul(ops.expand_dims(ops.softmax(highest, -1), -1), vectors), 2)


class VBLoRAModel(Tuner):
    """The base model with VB-LoRA in it."""

    def get_nb_savable_parameters(self, adapter: str = "default") -> tuple[int, int]:
        """How many float32 numbers an adapter's safetensors file is as large as: its own, and others (biases, copies).

        Differs: HF counts the logits of all adapters.
        """
        found = adapter_in(self.model, adapter)
        arrays = pack(found.config, {key: named.read() for key, named in found.entries(self.model).items()})
        own = sum(array.nbytes for key, array in arrays.items() if "vblora_" in key)
        return own // 4, sum(array.size for key, array in arrays.items() if "vblora_" not in key)

    def print_savable_parameters(self) -> None:
        """Print what `get_nb_savable_parameters` says, in HF's words."""
        own, others = self.get_nb_savable_parameters()
        print(
            f"VB-LoRA params to-be-saved (float32-equivalent): {own:,d} || total params to-be-saved: {own + others:,d}"
        )


def pack(config: Any, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Logits as the indices of the highest and all their shares but the last, where the config asks for that."""
    if not config.save_only_topk_weights:
        return dict(arrays)
    dtype = next((dtype for most, dtype in _INDEX_DTYPES if config.num_vectors < most), np.int64)
    packed = {}
    for key, array in arrays.items():
        if _LOGITS not in key:
            packed[key] = array
            continue
        indices = np.argsort(-array, axis=-1, kind="stable")[..., : config.topk]
        highest = np.take_along_axis(array, indices, -1).astype(np.float32)
        shares = np.exp(highest - highest[..., :1])
        shares /= shares.sum(-1, keepdims=True)
        packed[key + _INDICES] = np.ascontiguousarray(indices, dtype)
        packed[key + _WEIGHTS] = np.ascontiguousarray(shares[..., :-1])
    return packed


def unpack(config: Any, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Logits out of what `pack` made of them: those that were not among the highest are -∞.

    Raises:
        LoadError: they are to be trained, or not what `pack` makes.
    """
    chosen = {key.removesuffix(_INDICES): key for key in arrays if key.endswith(_INDICES)}
    if chosen and not config.inference_mode:
        raise LoadError(
            f"{_INCOMPLETE} Load it with is_trainable=False, or into an adapter whose config has inference_mode=True."
        )
    found = {key: array for key, array in arrays.items() if not key.endswith((_INDICES, _WEIGHTS))}
    for key, name in chosen.items():
        indices, shares = arrays[name].astype(np.int64), arrays.get(key + _WEIGHTS)
        if shares is None or shares.shape != (*indices.shape[:-1], indices.shape[-1] - 1):
            raise LoadError(f"{name} {indices.shape} needs {key + _WEIGHTS} with one share less for each part")
        if indices.min() < 0 or indices.max() >= config.num_vectors:
            raise LoadError(f"{name} names vectors that are not among num_vectors={config.num_vectors}")
        shares = np.concatenate([shares, 1 - shares.sum(-1, keepdims=True)], -1)
        logits = np.full((*indices.shape[:-1], config.num_vectors), -np.inf, np.float32)
        with np.errstate(divide="ignore", invalid="ignore"):
            np.put_along_axis(logits, indices, np.log(np.maximum(shares, 0)).astype(np.float32), -1)
        found[key] = logits
    return found


METHOD = Method(
    config=VBLoRAConfig,
    patches={"dense": VBLoRAPatch},
    shared=VectorBank,
    default_targets=VBLORA,
    identity_at_init=False,
    pack=pack,
    unpack=unpack,
    tuner=VBLoRAModel,
)
