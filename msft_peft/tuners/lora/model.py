"""LoraModel: what a LoRA model can do beyond every other Tuner."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from mindspore import Tensor

from msft_peft.backend.arrays import as_float32, to_numpy, write
from msft_peft.config import check_finite
from msft_peft.core import switch
from msft_peft.core.adapter import Adapter
from msft_peft.core.patch import Patch
from msft_peft.core.tuner import Tuner
from msft_peft.core.weighted import parts_of, put_beside, union_of, whole_modules
from msft_peft.errors import ConfigError
from msft_peft.io.adapter import PREFIX
from msft_peft.io.state import get_peft_model_state_dict
from msft_peft.tuners.lora.combine import (
    COMBINATION_TYPES,
    ON_DELTAS,
    ON_FACTORS,
    SIGN_METHODS,
    LowRank,
    combine,
    needs_density,
)
from msft_peft.tuners.lora.config import LoraConfig
from msft_peft.tuners.lora.exact import prepare_exactly
from msft_peft.tuners.lora.kasa import KasaPatch
from msft_peft.tuners.lora.monteclora import MontecloraPatch
from msft_peft.tuners.lora.patch import LoraPatch
from msft_peft.tuners.lora.penalty import Penalty
from msft_peft.tuners.lora.residual import minus_initial

# The pairs of weights that are a product of two factors and nothing else.
_FACTORS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))


class LoraModel(Tuner):
    """The base model with LoRA adapters in it, and the switches over them; what `PeftModel.base_model` is for LoRA."""

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Add an adapter that is made of others; inactive and frozen, the others untouched.

        The exact weighted sum Σ wᵢ·sᵢ·Bᵢ·Aᵢ is "cat", at the price of a rank that is the sum of theirs. "linear", and
        all other types without "svd", combine A and B each by itself, so that their product also has cross terms
        Bᵢ·Aⱼ. The types with "svd" combine the updates Bᵢ·Aᵢ and keep the best approximation of rank `svd_rank`.

        The new adapter has one rank throughout, lora_alpha = r (scaling 1), and the layers of all the others; layers
        that only some of them adapt are combined from these. A layer that one of them trains whole is copied.

        Args:
            adapters: names of the adapters to combine.
            weights: one number for each; may be negative.
            adapter_name: the new adapter's name.
            combination_type: "cat", "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"; or "svd" and any
                of the last four with "_svd" behind it. One adapter alone is scaled, by "linear", as in HF, unless
                `svd_rank` or `svd_clamp` is given.
            svd_rank: rank after an SVD; by default the largest of the adapters' ranks.
            svd_clamp: cut the factors of an SVD off at ± this quantile of their entries, in [0, 1].
            svd_full_matrices: HF's; the factors that are kept are the same either way, and no more are computed.
            svd_driver: chooses among the solvers of torch's CUDA; none of them is here, so it must be None.
            density: share of the entries that pruning keeps; for the types with ties, dare or magnitude_prune.
            majority_sign_method: how the types with ties elect a sign: "total" (by mass) or "frequency" (by head).

        Raises:
            AdapterNameError: the new name is taken or cannot be one, or an adapter is not there.
            ConfigError: an unknown type, one that lacks its density or equal ranks, a number out of range, a list and
                a regex among the `target_modules`, two adapters that train the same layer whole, an adapter with
                `target_parameters`, or an SVD of a grouped convolution.
            NotImplementedError: an option of an adapter, or `svd_driver`, that cannot be combined.

        In each case nothing has changed.

        Source: TIES: Yadav et al. 2023, arXiv:2306.01708; DARE: Yu et al. 2023, arXiv:2311.03099.
        Differs: HF does nothing when the name is taken; ignores `svd_rank` for one adapter alone; cuts `adapters` and
        `weights` to the shorter; leaves a half-made adapter after an error; loses layers that the first adapter
        excludes; takes over `use_rslora`, so that the scaling is √r; fails on an SVD of a 3-D convolution or of a rank
        above the weight's; mixes up the groups of grouped convolutions; leaves untrained copies in the place of
        trained heads.
        """
        parts = parts_of(self.model, adapters, weights, adapter_name)
        _check_places(parts)
        _check_settings(combination_type, svd_rank, svd_clamp, svd_driver, density, majority_sign_method)
        if len(parts) == 1 and svd_rank is None and svd_clamp is None:
            combination_type = "linear"
        settings: dict[str, Any] = {"density": density} if needs_density(combination_type) else {}
        if "ties" in combination_type:
            settings["majority_sign_method"] = majority_sign_method
        modules = whole_modules(parts)
        rank = _rank(parts, combination_type, svd_rank)
        sources = _sources(parts, weights, combination_type)
        made = self._prepare_like(parts, adapter_name, rank, set(sources))
        for path, patch in made.patches.items():
            updates, shares = zip(*sources[path], strict=True)
            factors = combine(
                updates, shares, combination_type, rank, groups=patch.site.groups, clamp=svd_clamp, **settings
            )
            for attribute, value in zip(_factors_of(patch), factors, strict=True):
                write(getattr(patch, attribute), value)
        put_beside(self, made, modules)

    def subtract_mutated_init(
        self, output_state_dict: Mapping[str, Tensor], adapter_name: str, kwargs: Mapping[str, Any] | None = None
    ) -> dict[str, Tensor]:
        """An adapter's tensors less those of another one: a LoRA of both ranks, s·(B·A - B₀·A₀) = s·[B, -B₀]·[A; A₀].

        It is what `save_pretrained(path_initial_model_for_weight_conversion=...)` does to an adapter that changed the
        base weights, for tensors at hand.

        Args:
            output_state_dict: the adapter's, under the keys of HF's files.
            adapter_name: an adapter in the model: what the first one began with, loaded as plain LoRA.
            kwargs: may have a "state_dict", to take that adapter's values from.

        Raises:
            AdapterNameError: it is not there.
            LoadError: it lacks some of the first one's factors, or has them in other sizes; they are listed.

        Differs: HF drops embeddings' factors and all that is no factor, silently, and fails with no `kwargs`.
        """
        taken = (kwargs or {}).get("state_dict")
        initial = get_peft_model_state_dict(self.model, state_dict=taken, adapter_name=adapter_name)
        return minus_initial(output_state_dict, initial, PREFIX)

    def penalty(self, adapter_names: str | list[str] | None = None) -> Penalty:
        """What KaSA and MonteCLoRA adapters add to the loss, as a Cell that is called where the loss is computed.

        It works in compiled code too. It knows the adapters that it was made for, whatever becomes active later.

        Args:
            adapter_names: of which adapters; the active ones by default.

        Raises:
            AdapterNameError: there is no such adapter.
        """
        return Penalty(self._patches(KasaPatch, adapter_names), self._patches(MontecloraPatch, adapter_names))

    def _get_kasa_loss(self, adapter_names: str | list[str] | None = None) -> Any:
        """KaSA's part of `penalty`, under HF's name; for PyNative."""
        return Penalty(self._patches(KasaPatch, adapter_names), [])()

    def _get_monteclora_loss(self, adapter_names: str | list[str] | None = None) -> Any:
        """MonteCLoRA's part of `penalty`, under HF's name; for PyNative."""
        return Penalty([], self._patches(MontecloraPatch, adapter_names))()

    def _patches(self, kind: type[LoraPatch], adapter_names: str | list[str] | None) -> list[LoraPatch]:
        """The Patches of this kind that these adapters have, or the active ones."""
        names = self.active_adapters if adapter_names is None else switch.require(self.model, adapter_names)
        held = [layer.held()[name] for layer in switch.layers_of(self.model) for name in names if name in layer.held()]
        return [patch for patch in held if isinstance(patch, kind)]

    def _prepare_like(self, parts: list[Adapter], name: str, rank: int, paths: set[str]) -> Adapter:
        """A fresh adapter of this rank on exactly these layers, with the first part's config for the rest."""
        heads = dict.fromkeys(head for part in parts for head in part.config.modules_to_save or [])  # type: ignore[attr-defined]
        first = parts[0].config
        assert isinstance(first, LoraConfig)
        config = replace(
            copy.deepcopy(first),
            r=rank,
            lora_alpha=rank,
            target_modules=union_of(parts, "target_modules"),
            rank_pattern={},
            alpha_pattern={},
            use_rslora=False,
            init_lora_weights=True,
            modules_to_save=list(heads) or None,
        )
        return prepare_exactly(self.model, config, name, paths)


def _factors_of(patch: Patch) -> tuple[str, str]:
    """The attributes that hold A and B.

    Raises:
        NotImplementedError: the Patch is more than a product of two factors, or acts on some tokens only.
    """
    for pair in _FACTORS:
        factored = isinstance(patch, LoraPatch) and patch.factored
        if (
            set(patch.keys) == set(pair)
            and factored
            and patch.additive
            and patch.invocation is None
            and not patch.rides
        ):
            return pair
    raise NotImplementedError(
        f"The adapter at {patch.site.path} is more than a product of two factors (DoRA, KaSA, lora_bias, "
        "aLoRA, trainable tokens), and combining such adapters is not built. Make them active together instead, by "
        "base_model.set_adapter([...])."
    )


def _check_places(parts: Sequence[Adapter]) -> None:
    for part in parts:
        if not isinstance(part.config, LoraConfig):
            raise ConfigError(
                f"add_weighted_adapter combines LoRA adapters, and '{part.name}' is one of {part.config.peft_type}"
            )
        if part.config.target_parameters:
            raise ConfigError(
                f"add_weighted_adapter does not support targeting nn.Parameter (problematic adapter '{part.name}')"
            )


def _check_settings(
    combination_type: str,
    rank: int | None,
    clamp: float | None,
    driver: str | None,
    density: float | None,
    majority_sign_method: str,
) -> None:
    if combination_type not in COMBINATION_TYPES:
        raise ConfigError(f"Invalid combination_type: {combination_type}. There are {sorted(COMBINATION_TYPES)}.")
    if needs_density(combination_type):
        if density is None:
            raise ConfigError(
                f"combination_type={combination_type!r} prunes and needs `density`, the share of the entries to keep"
            )
        check_finite("density", density)
        if density < 0:
            raise ConfigError(f"Density should be >= 0, got {density}")
    if majority_sign_method not in SIGN_METHODS:
        raise ConfigError(f'Unimplemented mask method "{majority_sign_method}"; there are {SIGN_METHODS}')
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank <= 0):
        raise ConfigError(f"`svd_rank` should be a positive integer, got {rank!r}")
    if clamp is not None:
        check_finite("svd_clamp", clamp)
    if clamp is not None and not 0 <= clamp <= 1:
        raise ConfigError(f"`svd_clamp` is a quantile in [0, 1], got {clamp}")
    if driver is not None:
        raise NotImplementedError(
            f"svd_driver={driver!r} chooses a solver of torch's CUDA; LAPACK computes the SVD here: leave it at None"
        )


def _rank(parts: Sequence[Adapter], combination_type: str, svd_rank: int | None) -> int:
    """The new adapter's rank: of each part, its largest counts.

    Raises:
        ConfigError: the ranks are not equal where they must be.
    """
    ranks = []
    for part in parts:
        config = part.config
        assert isinstance(config, LoraConfig)
        ranks.append(max([config.r, *config.rank_pattern.values()]))
    if combination_type in ON_FACTORS and len(set(ranks)) > 1:
        raise ConfigError(_unequal(dict(zip([part.name for part in parts], ranks, strict=True))))
    if combination_type == "cat":
        return sum(ranks)
    return svd_rank if svd_rank is not None and combination_type in ON_DELTAS else max(ranks)


def _unequal(ranks: Mapping[str, int], where: str = "") -> str:
    return (
        "All adapters must have the same r value when using combination_type linear, ties, dare_ties or dare_linear."
        f"{where} They have {dict(ranks)}: use 'cat' or a type with 'svd' instead."
    )


def _sources(
    parts: Sequence[Adapter], weights: Sequence[float], combination_type: str
) -> dict[str, list[tuple[LowRank, float]]]:
    """What each layer's new update is made of: (update, weight) pairs, by path.

    Raises:
        ConfigError: a layer has unequal ranks, and the type needs equal ones; or an SVD is asked for of a grouped
            convolution.
        NotImplementedError: an update is more than two factors.
    """
    found: dict[str, list[tuple[LowRank, float]]] = {}
    ranks: dict[str, dict[str, int]] = {}
    for part, weight in zip(parts, weights, strict=True):
        for path, patch in part.patches.items():
            if combination_type in ON_DELTAS and patch.site.groups > 1:
                raise ConfigError(
                    f"{path} is a convolution with groups={patch.site.groups}, whose update is no matrix that an SVD "
                    f"could cut: combination_type={combination_type!r} cannot be. Take 'cat', or one without 'svd'."
                )
            a, b = (_values(getattr(patch, attribute)) for attribute in _factors_of(patch))
            found.setdefault(path, []).append((LowRank(a, b, float(patch.scaling)), float(weight)))
            ranks.setdefault(path, {})[part.name] = len(a)
    if combination_type in ON_FACTORS:
        for path, here in ranks.items():
            if len(set(here.values())) > 1:
                raise ConfigError(_unequal(here, f" At {path} they differ."))
    return found


def _values(p: Any) -> np.ndarray:
    return as_float32(to_numpy(p))
