"""`create_arrow_model`: a model with several LoRA adapters and a router over them."""

import copy
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mindspore import nn

from msft_peft.backend.tree import remembered_modes
from msft_peft.config import CONFIG_NAME
from msft_peft.core.adapter import adapter_in, configs_of
from msft_peft.core.targets import matches_name
from msft_peft.core.wrapper import outer_cells
from msft_peft.errors import ConfigError
from msft_peft.hosts import as_cell
from msft_peft.model.peft_model import PeftModel
from msft_peft.tuners.lora import ArrowConfig, LoraConfig
from msft_peft.tuners.lora.arrow import is_plain

ROUTER, TASK, GENERAL = "arrow_router", "task_", "gks_"


def create_arrow_model(
    base_model: nn.Cell,
    task_specific_adapter_paths: Sequence[str | os.PathLike],
    arrow_config: ArrowConfig,
    general_adapter_paths: Sequence[str | os.PathLike] | None = None,
    **adapter_kwargs: Any,
) -> PeftModel:
    """The base model with LoRA adapters, called task_0, task_1, ..., and a router over them, "arrow_router", active.

    Adapters that are added later join those among which the tokens are divided.

    Args:
        base_model: changed in place.
        task_specific_adapter_paths: directories, or repository ids with an optional folder behind ("me/repo/folder").
        arrow_config: how to route; it is copied.
        general_adapter_paths: with `use_gks`, the general adapters (gks_0, ...), whose mean the others lose.
        adapter_kwargs: for `PeftModel.from_pretrained` and `load_adapter`.

    Raises:
        ConfigError: a model that has adapters already, no path, no general one where they are needed, `top_k` above
            their number, or adapters with other ranks or layers than the first.
        TypeError: an adapter that is no plain LoRA of dense layers.
        For what can be wrong with a file see `PeftModel.from_pretrained`. The base model is then as it was.

    Source: Ostapenko et al. 2024, arXiv:2405.11157; GenKnowSub: arXiv:2505.10939.
    Differs: HF writes the adapters' names into the `arrow_config` that it was given.
    """
    tasks, general = list(task_specific_adapter_paths or []), list(general_adapter_paths or [])
    if not tasks:
        raise ConfigError("`task_specific_adapter_paths` should contain at least one adapter path")
    if arrow_config.use_gks and not general:
        raise ConfigError("You should provide general LoRA paths if you want to use GenKnowSub.")
    if arrow_config.top_k > len(tasks):
        raise ConfigError(f"top_k={arrow_config.top_k}, but there are only {len(tasks)} adapters to choose from")
    config = copy.deepcopy(arrow_config)
    config.task_adapter_names = [f"{TASK}{i}" for i in range(len(tasks))]
    config.gks_adapter_names = [f"{GENERAL}{i}" for i in range(len(general))] if config.use_gks else []
    names = [*config.task_adapter_names, *config.gks_adapter_names]
    sources = [_source(path) for path in (*tasks, *general)][: len(names)]
    (first, *others) = zip(names, sources, strict=True)
    base_model = as_cell(base_model)
    held = configs_of(base_model)
    if held:
        raise ConfigError(
            f"create_arrow_model needs a model without adapters, and this one has {sorted(held)}: unload() them, or "
            "add a router to them with add_adapter(name, LoraConfig(arrow_config=...))."
        )
    trained, restore_modes = [p for p in base_model.get_parameters() if p.requires_grad], remembered_modes(base_model)
    model = PeftModel.from_pretrained(base_model, first[1][0], first[0], **first[1][1] | adapter_kwargs)
    try:
        for name, (place, below) in others:
            model.load_adapter(place, name, **below | adapter_kwargs)
        model.add_adapter(ROUTER, _router(model.get_base_model(), config, names))
        model.set_adapter(ROUTER)
    except Exception:
        model.unload()
        for p in trained:
            p.requires_grad = True
        restore_modes()
        raise
    return model


def _source(path: str | os.PathLike) -> tuple[str, dict[str, str]]:
    """(directory or repository id, {"subfolder": what is behind it}).

    Raises:
        ConfigError: a directory without an adapter.
    """
    if Path(path).is_dir():
        if not (Path(path) / CONFIG_NAME).is_file():
            raise ConfigError(f"Local adapter path '{path}' does not contain '{CONFIG_NAME}'.")
        return str(path), {}
    parts = str(path).strip("/").split("/")
    below = {"subfolder": "/".join(parts[2:])} if len(parts) > 2 else {}
    return ("/".join(parts[:2]), below) if below else (str(path), {})


def _router(base: nn.Cell, arrow: ArrowConfig, names: Sequence[str]) -> LoraConfig:
    """The router's config: for the layers that all the adapters have."""
    adapters = [adapter_in(base, name) for name in names]
    for adapter in adapters:
        odd = [path for path, patch in adapter.patches.items() if not is_plain(patch)]
        if odd or not isinstance(adapter.config, LoraConfig):
            raise TypeError(
                "Arrow routes among adapters that must only target Linear-like layers, by plain LoRA, and "
                f"{adapter.name} is none: at {odd}."
            )
    first = adapters[0]
    ranks = {adapter.name: {patch.r for patch in adapter.patches.values()} for adapter in adapters}
    if len(set.union(*ranks.values())) > 1:
        raise ConfigError(f"Arrow needs adapters of one rank, but there is a rank mismatch: {ranks}")
    for adapter in adapters:
        unlike = sorted(adapter.patches.keys() ^ first.patches.keys())
        if unlike:
            raise ConfigError(f"[{adapter.name}] target_modules mismatch: {unlike} are not in it and in {first.name}")
    short = sorted({path.rpartition(".")[2] for path in first.patches})
    exact = {path for path in outer_cells(base) if matches_name(path, short)} == set(first.patches)
    (rank,) = ranks[first.name]
    plain = LoraConfig(r=rank, target_modules=short if exact else sorted(first.patches))
    return replace(plain, arrow_config=arrow)
