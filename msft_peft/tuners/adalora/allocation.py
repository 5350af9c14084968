"""Which ranks of an AdaLoRA adapter are worth keeping, and how many there may be at each step."""

from collections.abc import Mapping, Sequence

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor

from msft_peft.backend.arrays import as_float32, to_numpy, write
from msft_peft.errors import ConfigError
from msft_peft.tuners.adalora.config import AdaLoraConfig
from msft_peft.tuners.adalora.patch import AdaLoraPatch

_WEIGHTS = ("lora_A", "lora_B", "lora_E")


class RankAllocator:
    """The budget of an adapter's ranks over the steps of its training, and the importance of each rank.

    The importance of a number p with gradient g is an average of |p·g| over the steps, times an average of how far
    |p·g| is off it; that of a rank is the one of its E plus the mean ones of its row of A and its column of B.

    Args:
        config: the schedule.
        patches: the adapter's, by the layers' paths; their values of E are pruned in place.

    Raises:
        ConfigError: there are to be more ranks at the end than at the beginning.

    Source: Zhang et al. 2023, arXiv:2303.10512, §3.2 and §3.3.
    """

    def __init__(self, config: AdaLoraConfig, patches: Mapping[str, AdaLoraPatch]) -> None:
        if config.target_r > config.init_r:
            raise ConfigError(
                f"AdaLoRA cannot prune ranks of {config.init_r} (`init_r`) to {config.target_r} (`target_r`)."
            )
        self.config, self.patches = config, patches
        self.first = sum(patch.r for patch in patches.values())
        self.last = config.target_r * len(patches)
        self.averages: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def weights(self) -> list[Parameter]:
        """All that the gradients are needed of."""
        return [getattr(patch, name) for patch in self.patches.values() if patch.r for name in _WEIGHTS]

    def budget(self, step: int) -> tuple[int, bool]:
        """How many ranks there may be after this step, and whether those above are to be pruned now."""
        config = self.config
        assert config.total_step is not None
        if step <= config.tinit:
            return self.first, False
        if step > config.total_step - config.tfinal:
            return self.last, True
        left = 1 - (step - config.tinit) / (config.total_step - config.tfinal - config.tinit)
        return int((self.first - self.last) * left**3 + self.last), step % config.deltaT == 0

    def observe(self, gradients: Mapping[int, Tensor]) -> None:
        """Take in the gradients of a step, by the `id` of the parameter."""
        beta1, beta2 = np.float32(self.config.beta1), np.float32(self.config.beta2)
        one = np.float32(1)
        for p in self.weights():
            now = np.abs(as_float32(to_numpy(p)) * as_float32(to_numpy(gradients[id(p)])))
            mean, spread = self.averages.get(id(p), (np.zeros_like(now), np.zeros_like(now)))
            mean = beta1 * mean + (one - beta1) * now
            spread = beta2 * spread + (one - beta2) * np.abs(now - mean)
            self.averages[id(p)] = (mean, spread)

    def scores(self, patch: AdaLoraPatch) -> np.ndarray:
        """(r,): the importance of each rank."""
        a, b, e = (np.multiply(*self.averages[id(getattr(patch, name))]) for name in _WEIGHTS)
        return e[:, 0] + (a.mean(1) + b.mean(0))

    def prune(self, budget: int) -> dict[str, list[bool]]:
        """Keep the `budget` most important ranks and set E of all others to zero; returns which are kept.

        Raises:
            ConfigError: no gradients have been seen, or none but zeros.
        """
        if not self.averages:
            raise ConfigError(
                "AdaLoRA has seen no gradients to judge its ranks by: call update_and_allocate after every step, from "
                f"the first one on and before step {self.config.total_step} - {self.config.tfinal}."
            )
        scores = {path: self.scores(patch) for path, patch in self.patches.items() if patch.r}
        # While all E are zero, as before the first step of a warm-up, nothing can be lost.
        if not any(score.any() for score in scores.values()) and any(
            to_numpy(self.patches[path].lora_E).any() for path in scores
        ):
            raise ConfigError(
                "All gradients that AdaLoRA has seen are zero, so that it would prune all ranks: hand over those of "
                "the steps that change the adapter."
            )
        surplus = self.first - budget
        order = np.sort(np.concatenate(list(scores.values())))
        threshold = order[surplus - 1] if surplus > 0 else -np.inf
        pattern = {}
        for path, patch in self.patches.items():
            kept = np.zeros(self.config.init_r, bool)
            if patch.r:
                kept[patch.places] = scores[path] > threshold
            pattern[patch.key_of(patch.site)] = kept.tolist()
        self.mask(pattern)
        return pattern

    def mask(self, pattern: Mapping[str, Sequence[bool]]) -> None:
        """Set E of what is not kept to zero, in place: compiled code sees it."""
        for patch in self.patches.values():
            every = pattern.get(patch.key_of(patch.site))
            if every is None or patch.r == 0:
                continue
            kept = np.array(every)[patch.places]
            patch.kept = kept.tolist()
            values = as_float32(to_numpy(patch.lora_E))
            write(patch.lora_E, Tensor(np.where(kept[:, None], values, np.float32(0)), ms.float32))

    def forget(self) -> None:
        """Give the memory of the averages back."""
        self.averages = {}
