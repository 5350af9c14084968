"""EVA: A starts as the principal components of what the layer sees, and ranks go where they explain most."""

import contextlib
import copy
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.communication import GlobalComm, get_group_size
from tqdm import tqdm

from msft_peft.backend.arrays import HALF_DTYPES, as_float32, to_numpy, write
from msft_peft.core import inject, switch
from msft_peft.core.adapter import Adapter, adapter_in
from msft_peft.core.patch import Patch
from msft_peft.core.prepare import prepare
from msft_peft.core.targets import match_pattern
from msft_peft.core.tuner import Tuner
from msft_peft.errors import ConfigError, PeftWarning
from msft_peft.hosts import Site
from msft_peft.tuners.lora.capture import dense_targets, evaluating, rows_of, watching
from msft_peft.tuners.lora.config import LoraConfig


class IncrementalPca:
    """Principal components of rows that come in batches, which are seen once and not kept.

    Formula: the SVD of [S·Vᵀ of what was seen; the batch less its mean; √(n·m/(n+m))·(mean so far - the batch's mean)]
    for n rows so far and m in the batch.

    Args:
        size: how many components.

    Attributes:
        components: (size, in), orthonormal rows.
        singular: (size,), the singular values of all rows less their mean.
        ratio: (size,), the share of the whole variance.

    Source: Ross et al. 2008, "Incremental Learning for Robust Visual Tracking", §3.1.
    """

    def __init__(self, size: int) -> None:
        self.size, self.seen = size, 0
        self.components: np.ndarray | None = None
        self.singular = self.ratio = np.zeros(size)

    def update(self, rows: np.ndarray) -> None:
        rows = rows.astype(np.float64)
        m, mean = len(rows), rows.mean(0)
        if self.components is None:
            stack, self._mean, self._squares = rows - mean, mean, ((rows - mean) ** 2).sum(0)
        else:
            shift = self._mean - mean
            weight = self.seen * m / (self.seen + m)
            stack = np.vstack([self.singular[:, None] * self.components, rows - mean, np.sqrt(weight) * shift])
            self._squares = self._squares + ((rows - mean) ** 2).sum(0) + weight * shift**2
            self._mean = (self.seen * self._mean + m * mean) / (self.seen + m)
        self.seen += m
        _, s, vt = np.linalg.svd(stack, full_matrices=False)
        # SVD leaves the signs open: the largest entry of each row is to be positive, so that batches can be compared.
        vt = vt * np.sign(vt[np.arange(len(vt)), np.abs(vt).argmax(1)])[:, None]
        self.components, self.singular = vt[: self.size], s[: self.size]
        self.ratio = self.singular**2 / max(self._squares.sum(), np.finfo(np.float64).tiny)


class _Layer:
    """The components of one layer's inputs, and which of them have settled."""

    def __init__(self, size: int, tau: float) -> None:
        self.pca, self.tau = IncrementalPca(size), tau
        self.settled = np.zeros(size, bool)

    def update(self, rows: np.ndarray) -> None:
        before = self.pca.components
        self.pca.update(rows)
        if before is not None:
            self.settled = (before * self.pca.components).sum(1) >= self.tau


class _Search:
    """The layers' components while batch after batch is seen.

    Attributes:
        done: the paths of the layers whose components, as many as they are to have, have settled.
    """

    def __init__(self, config: LoraConfig, sites: Mapping[str, Site], prepare: Any, gather: bool) -> None:
        self.eva, self.prepare, self.gather = config.eva_config, prepare, gather
        self.widths = {path: site.in_features for path, site in sites.items()}
        self.ranks = {path: match_pattern(config.rank_pattern, path, config.r) for path in sites}
        sizes = {path: min(round(self.ranks[path] * self.eva.rho), site.in_features) for path, site in sites.items()}
        self.layers = {path: _Layer(size, self.eva.tau) for path, size in sizes.items()}
        self.done: set[str] = set()
        self.begin(None)

    def begin(self, prepared: Any) -> None:
        """A new batch."""
        self.prepared = prepared
        self.rows: dict[str, list[np.ndarray]] = {path: [] for path in self.layers}

    def see(self, path: str, x: Tensor, y: Tensor) -> None:
        prepare = self.prepare
        if isinstance(prepare, Mapping):
            prepare = prepare.get(path, prepare_layer_inputs_fn_language_modeling)
        rows = x if prepare is None else prepare(x, self.prepared, path)
        self.rows[path].append(rows_of(rows if isinstance(rows, Tensor) else Tensor(np.asarray(rows)), path))

    def end(self) -> None:
        """The batch is through the model."""
        for path, layer in self.layers.items():
            if path in self.done:
                continue
            rows = np.concatenate([np.zeros((0, self.widths[path]), np.float32), *self.rows[path]])
            if self.gather:
                rows = gathered(rows)
            if len(rows) >= layer.pca.size:
                layer.update(rows)
        shares = self.shares()
        self.done = {
            path for path, layer in self.layers.items() if layer.pca.seen and layer.settled[: shares[path]].all()
        }

    def shares(self) -> dict[str, int]:
        """How many of all ranks each layer gets: as many as its components are among the best of all."""
        ratios = [(ratio, path) for path, layer in self.layers.items() for ratio in layer.pca.ratio]
        ratios.sort(key=lambda pair: -pair[0])
        found = dict.fromkeys(self.layers, 0)
        for _, path in ratios[: sum(self.ranks.values())]:
            found[path] += 1
        return found

    def components(self) -> dict[str, Tensor]:
        found = {}
        for path, share in self.shares().items():
            pca = self.layers[path].pca
            assert pca.components is not None
            rows = pca.components[:share]
            if self.eva.whiten:
                rows = rows / np.sqrt(pca.singular[:share, None])
            found[path] = Tensor(rows.astype(np.float32))
        return found

    def require_progress(self) -> None:
        """Raise ConfigError if a layer had no batch that was large enough."""
        short = [path for path, layer in self.layers.items() if not layer.pca.seen]
        if short:
            raise ConfigError(
                f"EVA looks for {max(self.layers[path].pca.size for path in short)} components, but no batch had that "
                f"many positions for {short}: use larger batches, a smaller r or rho, or check the mask."
            )


def gathered(rows: np.ndarray) -> np.ndarray:
    """The rows (n, in) of all workers, each with an n of its own, one below the other: the same on all of them."""
    gather = ops.AllGather()
    counts = gather(Tensor(np.array([len(rows)], np.float32))).asnumpy().astype(int)
    if not counts.any():
        return rows
    padded = np.zeros((counts.max(), rows.shape[1]), np.float32)
    padded[: len(rows)] = rows
    parts = np.split(gather(Tensor(padded)).asnumpy(), len(counts))
    return np.concatenate([part[:count] for part, count in zip(parts, counts, strict=True)])


def forward_fn_dict(model: nn.Cell, inputs: Mapping[str, Any]) -> Any:
    """The default `forward_fn`: the batch's columns as keyword arguments."""
    return model(**inputs)


def prepare_model_inputs_fn_language_modeling(model_input: Mapping[str, Any], peft_config: LoraConfig) -> np.ndarray:
    """The default `prepare_model_inputs_fn`: which positions (batch, length) of a batch of tokens count.

    Those with attention, and with `use_label_mask`, where the batch has labels, those of them whose label counts.

    Raises:
        ConfigError: the batch is no dict with "input_ids".
    """
    if not isinstance(model_input, Mapping) or "input_ids" not in model_input:
        raise ConfigError(
            "The default prepare_model_inputs_fn is for batches that are dicts with 'input_ids'. For others pass your "
            "own, or None, and a prepare_layer_inputs_fn."
        )
    mask = np.ones(model_input["input_ids"].shape, bool)
    if model_input.get("attention_mask") is not None:
        mask &= np.asarray(to_numpy(model_input["attention_mask"])).astype(bool)
    eva = peft_config.eva_config
    if eva.use_label_mask and model_input.get("labels") is not None:
        mask &= to_numpy(model_input["labels"]) != eva.label_mask_value
    return mask


def prepare_layer_inputs_fn_language_modeling(layer_input: Any, model_input: Any, layer_name: str) -> Any:
    """The default `prepare_layer_inputs_fn`: a layer's inputs (batch, length, in) at the positions that count."""
    x = layer_input[0] if isinstance(layer_input, tuple | list) else layer_input
    if model_input is None:
        return x
    if tuple(x.shape[:-1]) != tuple(model_input.shape):
        raise ConfigError(
            f"EVA: the input of {layer_name} has shape {tuple(x.shape)}, which does not go with a mask of "
            f"{tuple(model_input.shape)}. Pass a prepare_layer_inputs_fn for such layers."
        )
    return as_float32(to_numpy(x))[model_input]


def get_eva_state_dict(
    model: nn.Cell,
    dataloader: Iterable,
    peft_config: LoraConfig | None = None,
    forward_fn: Callable[[nn.Cell, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: Callable[[Any, LoraConfig], Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Callable | Mapping[str, Callable] | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """The components that `initialize_lora_eva_weights` starts A with: HF's name of a layer -> (rank, in).

    The model runs in PyNative, evaluation mode and with its adapters off; all is restored. Batches are taken, again
    from the start if need be, until the components of every layer have settled (see `EvaConfig.tau`).

    Formula: of the principal components of the layers' inputs, those with the largest shares of their layer's variance
    are taken, as many as all layers have ranks together, and of one layer at most r·rho; with `whiten` each is divided
    by the root of its singular value (as HF does; by its standard deviation would make the variances equal).

    Args:
        model: a PeftModel, or the base model.
        dataloader: batches: any iterable that can be gone through again, or a MindSpore dataset.
        peft_config: the config where `model` is no PeftModel.
        forward_fn: runs the model on a batch; it must call the model itself, since hooks do not run inside ms.jit.
        prepare_model_inputs_fn: batch, config -> what the next function gets of it.
        prepare_layer_inputs_fn: layer input, that, layer path -> rows (positions, in); or a dict of such functions by
            layer path. None: all positions.
        adapter_name: which adapter of a PeftModel.
        gather_distributed_inputs: in a distributed run every worker brings its own batches, and all of them find the
            components of what all saw; they must call this together. False: each finds its own.
        show_progress_bar: show one.

    Raises:
        ConfigError: no config, one that is not for EVA, no batches, or too few positions in every batch.

    Differs: HF goes on for ever if no batch has as many positions as components are looked for.
    """
    tuner, base, config = _settled(model, peft_config, adapter_name)
    gather = gather_distributed_inputs and GlobalComm.INITED and get_group_size() > 1
    if next(iter(_batches(dataloader)), None) is None:
        raise ConfigError("dataloader is empty")
    sites = dense_targets(base, config)
    search = _Search(config, sites, prepare_layer_inputs_fn, gather)
    off = contextlib.nullcontext() if tuner is None else tuner._disabled()
    watched = watching({path: site.layer for path, site in sites.items()}, search.see)
    with evaluating(model), off, watched, tqdm(total=len(sites), desc="EVA", disable=not show_progress_bar) as bar:
        while True:
            for batch in _batches(dataloader):
                prepared = None if prepare_model_inputs_fn is None else prepare_model_inputs_fn(batch, config)
                search.begin(prepared)
                forward_fn(model, batch)
                search.end()
                bar.update(len(search.done) - bar.n)
                if len(search.done) == len(sites):
                    return search.components()
            search.require_progress()


def initialize_lora_eva_weights(
    model: nn.Cell,
    dataloader: Iterable | None = None,
    eva_state_dict: Mapping[str, Any] | None = None,
    forward_fn: Callable[[nn.Cell, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: Callable[[Any, LoraConfig], Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Callable | Mapping[str, Callable] | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> nn.Cell:
    """Put EVA's start into an adapter made with `init_lora_weights="eva"`: A the components, B zero.

    Layers get the ranks of their components, which the adapter's config then says (`rank_pattern`, and `alpha_pattern`
    with `adjust_scaling_factors`); those with none are no longer targets. The adapter's weights are new Parameters:
    build the optimizer and the gradient function afterwards.

    Args:
        model: a PeftModel.
        dataloader: see `get_eva_state_dict`, as for the others.
        eva_state_dict: components that `get_eva_state_dict` found, instead of a dataloader.

    Returns:
        The same model.

    Raises:
        ConfigError: neither dataloader nor components, an adapter that is not for EVA, or components of layers that it
            does not have or of another size; and see `get_eva_state_dict`.
        AdapterNameError: there is no such adapter.

    Source: Paischer et al. 2024, arXiv:2410.07170, §3.
    """
    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, Tuner):
        raise ConfigError(f"model must be a PeftModel, got {type(model).__name__}")
    switch.require(tuner.model, adapter_name)
    config = cast("LoraConfig", tuner.peft_config[adapter_name])
    if getattr(config, "init", None) != "eva":
        raise ConfigError("`initialize_lora_eva_weights` can only be used with `init_lora_weights='eva'`")
    if eva_state_dict is None:
        if dataloader is None:
            raise ConfigError("dataloader is required if eva_state_dict is not provided")
        eva_state_dict = get_eva_state_dict(
            model,
            dataloader,
            None,
            forward_fn,
            prepare_model_inputs_fn,
            prepare_layer_inputs_fn,
            adapter_name,
            gather_distributed_inputs,
            show_progress_bar,
        )
    base, old = tuner.model, adapter_in(tuner.model, adapter_name)
    parts = {path: as_float32(to_numpy(value)) for path, value in eva_state_dict.items()}
    _check_fit(parts, old)
    in_half = any(p.dtype in HALF_DTYPES for p in _weights(old))
    new = prepare(base, _with_ranks(config, parts, old), adapter_name, autocast=not in_half)
    for path, patch in _layers(new).items():
        if path in parts:
            write(patch.lora_A, Tensor(parts[path], patch.lora_A.dtype))
    active, trainable = tuner.active_adapters, any(p.requires_grad for p in _weights(old))
    inject.attach(base, new)
    inject.use(base, active)
    inject.settle(model)
    tuner.set_requires_grad(adapter_name, trainable)
    return model


def _settled(model: nn.Cell, config: LoraConfig | None, adapter_name: str) -> tuple[Tuner | None, nn.Cell, LoraConfig]:
    """The tuner if there is one, the base model, and the config that counts."""
    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, Tuner):
        tuner, base = None, model
    else:
        switch.require(tuner.model, adapter_name)
        base, config = tuner.model, cast("LoraConfig", tuner.peft_config[adapter_name])
    if config is None:
        raise ConfigError("peft_config is required if model is not a PeftModel")
    if getattr(config, "eva_config", None) is None:
        raise ConfigError("EVA needs LoraConfig(init_lora_weights='eva', eva_config=EvaConfig(...))")
    return tuner, base, config


def _layers(adapter: Adapter) -> dict[str, Patch]:
    """The Patches at its target layers, by HF's names; what else it has (trainable tokens) is no affair of EVA's."""
    return {adapter.patches[path].site.path: adapter.patches[path] for path in adapter.targets}


def _weights(adapter: Adapter) -> list[Any]:
    return [p for patch in adapter.patches.values() for p in patch.get_parameters()]


def _batches(dataloader: Any) -> Iterator[Any]:
    """A MindSpore dataset's batches as dicts, or whatever an iterable holds."""
    rows = getattr(dataloader, "create_dict_iterator", None)
    return rows(num_epochs=1) if callable(rows) else iter(dataloader)


def _check_fit(parts: Mapping[str, np.ndarray], adapter: Adapter) -> None:
    dense = {path: patch.site for path, patch in _layers(adapter).items() if patch.site.kind == "dense"}
    unknown = sorted(parts.keys() - dense.keys())
    misshapen = [
        f"{path}: {part.shape}, wanted (rank, {dense[path].in_features})"
        for path, part in parts.items()
        if path in dense and (part.ndim != 2 or part.shape[1] != dense[path].in_features)
    ]
    if unknown or misshapen:
        raise ConfigError(
            f"The EVA components do not fit the adapter {adapter.name!r}: layers that it does not adapt {unknown}, "
            f"shapes {misshapen}."
        )
    if not any(len(part) for part in parts.values()):
        raise ConfigError("The EVA components are empty: no layer would be adapted.")
    missing = sorted(dense.keys() - parts.keys())
    if missing:
        warnings.warn(
            "the following layers were initialized with init_lora_weights=True because they were not found in the eva "
            f"state_dict: {missing}",
            PeftWarning,
            stacklevel=3,
        )


def _with_ranks(config: LoraConfig, parts: Mapping[str, np.ndarray], adapter: Adapter) -> LoraConfig:
    """The config with the ranks of these components; whole paths first, so that they win over patterns."""
    config = copy.deepcopy(config)
    ranks, alphas = {}, {}
    for path, patch in _layers(adapter).items():
        rank = len(parts[path]) if path in parts else patch.r
        if rank and rank != patch.r:
            # A pattern may also be the end of a path: say so where another layer's path ends with this one.
            ambiguous = any(p.site.path.endswith(f".{path}") for p in adapter.patches.values())
            key = f"^{re.escape(path)}$" if ambiguous else path
            ranks[key] = rank
            if config.eva_config.adjust_scaling_factors:
                alphas[key] = patch.lora_alpha * rank / patch.r  # with use_rslora too, as in HF
    config.rank_pattern = ranks | {key: r for key, r in config.rank_pattern.items() if key not in ranks}
    config.alpha_pattern = alphas | {key: a for key, a in config.alpha_pattern.items() if key not in alphas}
    if any(not len(part) for part in parts.values()):
        config.target_modules = [path for path in _layers(adapter) if path not in parts or len(parts[path])]
        config.layers_to_transform = config.layers_pattern = config.exclude_modules = None
    return config
