"""State dicts: the tensors of an adapter, or of the base model beneath it, out of a model and into one."""

import copy
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from mindspore import Parameter, Tensor, nn

from msft_peft.backend import arguments
from msft_peft.backend.tree import Named, torch_shape
from msft_peft.core import switch
from msft_peft.core.adapter import Adapter, adapter_in
from msft_peft.core.keys import PREFIX
from msft_peft.core.prepare import unmerged
from msft_peft.core.tuner import base_of
from msft_peft.core.wrapper import Wrapper
from msft_peft.errors import LoadError
from msft_peft.io.adapter import Tensors, embeddings_to_save, packed, read_tensors, unpacked
from msft_peft.io.load import LoadReport, as_arrays, fit

State = Mapping[str, Tensor | Parameter | np.ndarray]


def get_peft_model_state_dict(
    model: nn.Cell,
    state_dict: State | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, Tensor]:
    """An adapter's tensors under the keys that HF's files have: what `save_pretrained` writes.

    Args:
        model: a `PeftModel`, or a model with injected adapters; the keys of the latter have no `base_model.model.`.
        state_dict: take the values from here (under parameter names, as in `model.parameters_dict()`), not from the
            model: of an earlier step, say.
        adapter_name: which adapter; no key holds its name.
        unwrap_compiled: HF's; compiling renames nothing in MindSpore, so there is nothing to unwrap.
        save_embedding_layers: see `PeftModel.save_pretrained`.

    Returns:
        New Tensors, which later training does not change.

    Raises:
        AdapterNameError: the adapter is not there.
        LoadError: `state_dict` lacks some of its tensors; they are listed.

    Differs: HF returns the model's own tensors, which change under the caller.
    """
    base = base_of(model)
    adapter = adapter_in(base, adapter_name)
    prefix = "" if base is model else adapter.prefix
    beside = embeddings_to_save(base, adapter, save_embedding_layers)
    if state_dict is None:
        entries = adapter.entries(base) | beside
    else:
        entries = entries_from(state_dict, adapter, base, prefix)[1] | taken_from(state_dict, beside, prefix)
    with unmerged(base, (named.parameter for named in entries.values())):
        return {key: Tensor(array.copy()) for key, array in packed(entries, prefix, adapter.config).items()}


def set_peft_model_state_dict(
    model: nn.Cell,
    peft_model_state_dict: State,
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> LoadReport:
    """Write tensors into an adapter that is in the model, in place: compiled code sees them without a recompilation.

    Args:
        model: a `PeftModel`, or a model with injected adapters.
        peft_model_state_dict: Tensors, Parameters or arrays under HF's keys, with or without `base_model.model.` and
            the adapter's name, or under parameter names.
        adapter_name: which adapter.
        ignore_mismatched_sizes: warn of tensors of other shapes and pass over them; otherwise an error.
        low_cpu_mem_usage: the adapter was made without initial values, so that a missing tensor is an error.

    Returns:
        What was written, and what was missing or unexpected; there is a warning of these too.

    Raises:
        AdapterNameError: the adapter is not there.
        LoadError: a tensor has another shape, or is missing with `low_cpu_mem_usage`, or cannot be what it is to be;
            nothing was written.
        TypeError: a value that is no tensor.

    Differs: HF says nothing of missing and unexpected keys unless its return value is read, and lists all of the base
    model's among the missing.
    """
    base = base_of(model)
    adapter = adapter_in(base, adapter_name)
    tensors = unpacked(
        Tensors("The given state dict", as_arrays(peft_model_state_dict)), copy.deepcopy(adapter.config)
    )
    fitted = fit(tensors, adapter, base)
    fitted.report.check(False, ignore_mismatched_sizes, low_cpu_mem_usage)
    switch.unmerge_first(base, f"Adapter {adapter_name} cannot be overwritten when the model is merged.")
    return fitted.apply(adapter, base)


def load_peft_weights(
    model_id: str | os.PathLike, device: str | None = None, key_mapping: Mapping[str, str] | None = None, **hub: Any
) -> dict[str, Tensor]:
    """Read the tensors of an adapter in a directory or Hub repository, for `set_peft_model_state_dict`.

    Args:
        model_id: a directory, or a repository id.
        device: HF's; MindSpore moves tensors to its device by itself, when they are used.
        key_mapping: regex -> replacement for keys without `base_model.model.`; the first that matches is applied.
        hub: `subfolder`, and `revision`, `token`, `cache_dir`, ... for `huggingface_hub`.

    Raises:
        FileNotFoundError: no weights file.
        LoadError: a broken one, or a bad `key_mapping`.
    """
    tensors = read_tensors(model_id, key_mapping=key_mapping, **hub)
    return {key: Tensor(array) for key, array in tensors.arrays.items()}


def get_base_model_state_dict(model: nn.Cell) -> dict[str, Parameter]:
    """The base model's own parameters under the names that they had before it was wrapped.

    Layers that adapters train whole are given by their originals; merged adapters are in the weights.

    Returns:
        The Parameters themselves, as `Cell.parameters_dict` gives them: nothing is copied.
    """
    first: dict[int, tuple[str, Parameter]] = {}
    for name, (p, _) in _base_parameters(base_of(model)).items():
        first.setdefault(id(p), (name, p))
    return dict(first.values())


def set_base_model_state_dict(model: nn.Cell, state_dict: State, strict: bool = True) -> LoadReport:
    """Write base weights, under the names that they had before the model was wrapped, in place.

    Args:
        model: a `PeftModel`, or a model with injected adapters.
        state_dict: Tensors, Parameters or arrays, in MindSpore's shapes.
        strict: missing and unexpected names are an error; otherwise a warning.

    Returns:
        What was written, missing and unexpected.

    Raises:
        LoadError: names that do not fit, or tensors of other shapes; all of them are listed, and nothing was written.
    """
    base = base_of(model)
    own, arrays = _base_parameters(base), as_arrays(state_dict)
    both = sorted(own.keys() & arrays.keys())
    given = {id(own[name][0]) for name in both}
    wrong = [name for name in both if arrays[name].shape not in (tuple(own[name][0].shape), own[name][1])]
    report = LoadReport(
        adapter_name="",
        origin="The given state dict",
        applied=tuple(name for name in both if name not in wrong),
        missing_keys=tuple(sorted(name for name in own.keys() - arrays.keys() if id(own[name][0]) not in given)),
        unexpected_keys=tuple(sorted(arrays.keys() - own.keys())),
        mismatched=tuple(
            f"{name}: the state dict has shape {arrays[name].shape}, the model {tuple(own[name][0].shape)}"
            for name in wrong
        ),
    )
    report.check(strict, ignore_mismatched_sizes=False)
    switch.unmerge_first(base, "Base weights cannot be written when adapters are merged into them.")
    for name in report.applied:
        p, shape = own[name]
        Named(name, name, p, shape).write(arrays[name])
    return report


def _base_parameters(base: nn.Cell) -> dict[str, tuple[Parameter, tuple[int, ...]]]:
    """The base model's parameters by all their names before wrapping, with the shapes that torch gives them."""
    found: dict[str, tuple[Parameter, tuple[int, ...]]] = {}

    def walk(cell: nn.Cell, path: str) -> None:
        while isinstance(cell, Wrapper):
            cell = cell.base()
        for local, p in cell._params.items():
            if p is not None:
                found[f"{path}{local}"] = (p, torch_shape(cell, local, tuple(p.shape)))
        for key, child in cell._cells.items():
            if child is not None:
                walk(child, f"{path}{key}.")

    walk(base, "")
    return found


def entries_from(
    state_dict: State, adapter: Adapter, model: nn.Cell, prefix: str | None = None
) -> tuple[Adapter, dict[str, Named]]:
    """`Adapter.entries` with the values that `state_dict` has, and the adapter that they are of.

    Virtual tokens that a network makes are made anew, by a copy of it with those values.

    Raises:
        LoadError: see `taken_from`.
    """
    values = taken_from(state_dict, adapter.needed(model), adapter.prefix if prefix is None else prefix)
    if adapter.prompt is None or not adapter.prompt.reparametrised:
        return adapter, values
    prompt = copy.deepcopy(adapter.prompt)
    for key, named in prompt.own().items():
        named.write(values[key].read())
    adapter = replace(adapter, prompt=prompt)
    return adapter, {key: values.get(key, named) for key, named in adapter.entries(model).items()}


def taken_from(state_dict: State, entries: Mapping[str, Named], prefix: str = PREFIX) -> dict[str, Named]:
    """The same entries with the values that `state_dict` has under the parameters' names.

    Args:
        state_dict: may hold more than is needed.
        entries: see `Adapter.entries`.
        prefix: stands before the names.

    Raises:
        LoadError: some are not there, or have other shapes; they are listed.
    """
    arguments.mapping("state_dict", state_dict)
    # A tied parameter has several names, of which one is enough.
    there = {id(n.parameter): prefix + n.local for n in entries.values() if prefix + n.local in state_dict}
    names = {key: there.get(id(named.parameter), prefix + named.local) for key, named in entries.items()}
    absent = sorted(name for name in names.values() if name not in state_dict)
    if absent:
        raise LoadError(f"The given state_dict lacks tensors that the adapter has: {absent}.")
    arrays = as_arrays({key: state_dict[name] for key, name in names.items()})
    wrong = [
        f"{names[key]}: {array.shape}, the model {entries[key].shape}"
        for key, array in arrays.items()
        if array.shape not in (entries[key].shape, tuple(entries[key].parameter.shape))
    ]
    if wrong:
        raise LoadError(f"The given state_dict has tensors of other shapes than the adapter: {'; '.join(wrong)}.")
    return {
        key: entries[key]._replace(parameter=Parameter(Tensor(array), name=names[key]))
        for key, array in arrays.items()
    }
