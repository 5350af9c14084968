"""What a LoRA adapter may have beside its target layers: trainable tokens, and updates of single parameters."""

import re
from collections.abc import Mapping
from dataclasses import replace

from mindspore import nn

from msft_peft.backend.tree import named_parameters
from msft_peft.core.adapter import configs_of, held_ids
from msft_peft.core.layer import site_of
from msft_peft.core.naming import named_as_in_hf
from msft_peft.core.patch import Patch
from msft_peft.core.targets import matches_name
from msft_peft.core.tied import Tied
from msft_peft.errors import ConfigError, NoMatchingPeftModuleError
from msft_peft.hosts import Site, hf_names, input_table, parameter_site
from msft_peft.tuners.lora.config import LoraConfig
from msft_peft.tuners.lora.parameter import LoraParameterPatch
from msft_peft.tuners.lora.patch import LoraEmbeddingPatch
from msft_peft.tuners.lora.tied import LoraTiedPatch
from msft_peft.tuners.trainable_tokens import DELTA, TiedTokensPatch, TokensPatch

# Where HF's LoRA keeps them below the layer.
TOKEN_KEY = f"token_adapter.{DELTA}"


def extra_patches(
    model: nn.Cell,
    config: LoraConfig,
    cells: Mapping[str, nn.Cell],
    patches: Mapping[str, Patch],
    tied: Tied | None,
    autocast: bool,
    low_cpu_mem_usage: bool,
) -> dict[str, Patch]:
    """The Patches beside those at the target layers, or in their place, by path.

    Args:
        model: the base model.
        config: the adapter's config.
        cells: every cell that it can name, by path.
        patches: those at the target layers.
        tied: the input table and the output head, if they share a weight.
        autocast, low_cpu_mem_usage: see `Patch`.

    Raises:
        NoMatchingPeftModuleError: a name matches nothing.
        ConfigError: what is named is no place for them.
    """
    _check_company(model, config)
    found = token_patches(model, config, cells, tied, autocast)
    found |= parameter_patches(model, config, autocast, low_cpu_mem_usage)
    if config.ensure_weight_tying and tied is not None and tied.paths & set(patches):
        found |= tied_patches(config, patches, tied, autocast, low_cpu_mem_usage)
    return found


def _check_company(model: nn.Cell, config: LoraConfig) -> None:
    """Raise ConfigError where KaSA and other adapters would stand on one model, whose weights KaSA cuts."""
    kasa = config.kasa_config is not None
    for name, other in configs_of(model).items():
        if kasa is not (getattr(other, "kasa_config", None) is not None):
            raise ConfigError(
                "KaSA cannot be combined with adapters that don't use KaSA, since KaSA modifies the base weights: the "
                f"new adapter {'uses' if kasa else 'does not use'} KaSA but adapter '{name}' "
                f"{'does not' if kasa else 'does'}. Delete it or unload() first."
            )


def tied_patches(
    config: LoraConfig, patches: Mapping[str, Patch], tied: Tied, autocast: bool, low_cpu_mem_usage: bool
) -> dict[str, Patch]:
    """One update for a tied table and head, if one of them is a target."""
    source = patches.get(tied.table.path) or LoraEmbeddingPatch(tied.table, config, autocast, low_cpu_mem_usage)
    assert isinstance(source, LoraEmbeddingPatch)
    head = LoraTiedPatch(tied.head, config, autocast, low_cpu_mem_usage, source)
    return {tied.table.path: source, tied.head.path: head}


def token_patches(
    model: nn.Cell, config: LoraConfig, cells: Mapping[str, nn.Cell], tied: Tied | None, autocast: bool
) -> dict[str, Patch]:
    """Those of `trainable_token_indices`; a layer tied to one of them follows it."""
    wanted = config.trainable_token_indices
    if wanted is None:
        return {}
    names = {path: name for name, path in named_as_in_hf(cells, hf_names(model)).items()}
    if not isinstance(wanted, dict):
        table = input_table(model)
        wanted = {next((names[path] for path, cell in cells.items() if cell is table), "embed_tokens"): wanted}
    found: dict[str, Patch] = {}
    for name, indices in wanted.items():
        hits = [path for path in cells if matches_name(names[path], [name])]
        if not hits:
            raise NoMatchingPeftModuleError(
                f"trainable_token_indices: {name!r} matches none of the base model's {len(cells)} modules. If the "
                "embedding has another name, pass {'its name': [indices]}."
            )
        for path in hits:
            if path in found:
                raise ConfigError(
                    f"trainable_token_indices: several names match {path}, the last of them {name!r}. Give each layer "
                    "its tokens under one name."
                )
            found[path] = TokensPatch(_rows_of(cells[path], names[path]), config, autocast, indices, TOKEN_KEY)
    if tied is not None:
        source, head = tied.table.path, tied.head.path
        same = head in found and source in found and found[head].place == found[source].place
        if source in found and (head not in found or same):
            found[head] = TiedTokensPatch(tied.head, config, autocast, found[source])
        elif head in found and source in found and config.ensure_weight_tying:
            raise ConfigError(
                "Cannot ensure weight tying when different token indices are specified for tied layers: "
                f"{source} and {head}. Use the same indices, or set ensure_weight_tying=False."
            )
    return found


def _rows_of(cell: nn.Cell, path: str) -> Site:
    site = site_of(cell, path)
    if site is None or site.kind not in ("embedding", "dense") or site.transposed:
        raise ConfigError(
            f"trainable_token_indices cannot be applied to {path} ({type(cell).__name__}): only embeddings and dense "
            "layers have rows of tokens."
        )
    return site


def parameter_patches(model: nn.Cell, config: LoraConfig, autocast: bool, low_cpu_mem_usage: bool) -> dict[str, Patch]:
    """Those of `target_parameters`. Several in one module are wrapped around each other, the first one innermost."""
    wanted = config.target_parameters
    held = held_ids(model)
    own = [entry for entry in named_parameters(model) if wanted and id(entry.parameter) not in held]
    named, hf_name = {}, hf_names(model)
    for entry in own:
        owner, dot, leaf = re.sub(r"(\.base_layer)+\.", ".", entry.key).rpartition(".")
        named[hf_name(owner) + dot + leaf] = (owner, entry)
    found: dict[str, Patch] = {}
    for key, (owner, entry) in named.items():
        if not matches_name(key, wanted or []):
            continue
        if not owner:
            raise ConfigError(f"Targeting a parameter of the top-level module is not supported ({key!r}).")
        site = parameter_site(model, owner, entry.local.rpartition(".")[2])
        site = replace(site, path=hf_name(owner))
        # What stands there already moves one level in.
        here = [path for path in found if path.split(".base_layer")[0] == owner]
        found |= {f"{path}.base_layer": found.pop(path) for path in sorted(here, key=len, reverse=True)}
        found[owner] = LoraParameterPatch(site, config, autocast, low_cpu_mem_usage)
    unmatched = [name for name in wanted or [] if not any(matches_name(key, [name]) for key in named)]
    if unmatched:
        raise NoMatchingPeftModuleError(
            f"target_parameters={wanted!r}: {unmatched} match none of the base model's parameters. Please check the "
            "names; each must be a parameter's whole path or the end of one from a dot on."
        )
    return found
