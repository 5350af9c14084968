"""From tensors into an adapter: what fits, what does not, and what became of it."""

import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from msft_peft.backend.arrays import as_float32, to_numpy
from msft_peft.backend.tree import Named, get_child, named_parameters
from msft_peft.core.adapter import Adapter
from msft_peft.core.keys import PREFIX, in_file
from msft_peft.core.layer import introduce
from msft_peft.core.patch import Patch
from msft_peft.core.wrapper import Wrapper
from msft_peft.errors import LoadError, MergeError, PeftWarning
from msft_peft.hosts import hf_names
from msft_peft.io.adapter import Tensors, embeddings_of


@dataclass(frozen=True)
class LoadReport:
    """What became of the tensors that were loaded into an adapter; `print` it, or read its lists.

    All keys are those of HF's files. HF's scripts know `missing_keys` and `unexpected_keys`.

    Attributes:
        adapter_name: the adapter.
        origin: where the tensors came from.
        applied: keys that were copied into the model.
        missing_keys: keys that the adapter needs and that were not there.
        unexpected_keys: keys that were there and that the adapter does not have.
        mismatched: of tensors with another shape: "key: the file has shape (4, 6), the model (8, 6)".
        does_something: whether the adapter makes the model another one than its base. False if every weight that it
            adds is zero (an adapter that was never trained, say); None where that cannot be told, and before the
            tensors are copied.
    """

    adapter_name: str
    origin: str
    applied: tuple[str, ...] = ()
    missing_keys: tuple[str, ...] = ()
    unexpected_keys: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    does_something: bool | None = None

    def faults(self) -> list[str]:
        """What did not fit, a sentence each."""
        found = []
        if self.missing_keys:
            found.append(f"Found missing adapter keys while loading the checkpoint: {list(self.missing_keys)}.")
        if self.unexpected_keys:
            found.append(f"Found unexpected keys that the adapter does not have: {list(self.unexpected_keys)}.")
        if self.mismatched:
            found.append("size mismatch for " + "; ".join(self.mismatched) + ".")
        return found

    def __str__(self) -> str:
        lines = [f"Adapter {self.adapter_name!r} from {self.origin}: {len(self.applied)} tensors loaded."]
        lines += self.faults() or ["Everything fitted."]
        if self.does_something is False:
            lines.append("The adapter does nothing: every weight that it adds to the base model is zero.")
        return "\n".join(lines)

    def check(self, strict: bool, ignore_mismatched_sizes: bool, low_cpu_mem_usage: bool = False) -> None:
        """Raise or warn of everything that does not fit, all of it at once.

        Args:
            strict: missing and unexpected tensors are errors.
            ignore_mismatched_sizes: tensors of other shapes are none.
            low_cpu_mem_usage: the adapter has no initial values to keep: whatever it needs and does not get is an
                error.

        Raises:
            LoadError: any of these.
        """
        faults = self.faults()
        if not faults:
            return
        text = f"{self.origin} does not fit the adapter. " + " ".join(faults)
        if low_cpu_mem_usage and (self.missing_keys or self.mismatched):
            raise LoadError(
                text + " Nothing was changed. With low_cpu_mem_usage=True no initial values were drawn which those "
                "weights could keep: load without it."
            )
        if (strict and (self.missing_keys or self.unexpected_keys)) or (
            self.mismatched and not ignore_mismatched_sizes
        ):
            raise LoadError(
                text + " Nothing was changed. Is it the adapter of another base model? strict=False loads what is "
                "there and warns; ignore_mismatched_sizes=True leaves tensors of other shapes at their initial values."
            )
        warnings.warn(text + " These weights keep the values that they have.", PeftWarning, stacklevel=4)


@dataclass(frozen=True)
class Fit:
    """How tensors fit an adapter: the report so far, and the (parameter, new value) pairs that `apply` writes."""

    report: LoadReport
    pairs: tuple[tuple[Named, np.ndarray], ...]

    def apply(self, adapter: Adapter, model: nn.Cell) -> LoadReport:
        """Copy what fits into the adapter, in the model or still outside it, in place: compiled graphs see it."""
        # Asked first: the base model's own biases and embeddings are about to be written.
        changed = any(_differ(array, now) for array, now in _beside_patches(self.pairs, adapter, model))
        for named, array in self.pairs:
            named.write(array)
        introduce(model)
        # What stands before the input is always looked at.
        acting = changed or adapter.prompt is not None or _any(acts(patch) for patch in adapter.patches.values())
        return replace(self.report, does_something=acting)


def fit(tensors: Tensors, adapter: Adapter, model: nn.Cell) -> Fit:
    """Compare tensors with what `adapter` needs, in the model or still outside it; nothing is written.

    Raises:
        LoadError: two tensors have the same key, or a weight cannot have the values that it is given.
    """
    prefix = adapter.prefix
    entries = {in_file(prefix, key): named for key, named in adapter.accepted(model).items()}
    # A file may also carry the base model's embeddings, see `embeddings_of`.
    carried = {prefix + key: named for key, named in embeddings_of(model, adapter).items()}
    arrays = by_key(tensors, adapter, model)
    entries |= {key: named for key, named in carried.items() if key in arrays}
    pairs, mismatched = [], []
    for key in sorted(entries.keys() & arrays.keys()):
        found, wanted = tuple(arrays[key].shape), entries[key].shape
        if found == wanted:
            pairs.append((entries[key], arrays[key]))
        else:
            mismatched.append(f"{key}: the file has shape {found}, the model {wanted}")
    _check_copies(pairs, str(tensors.origin))
    _check_values(pairs, adapter, str(tensors.origin))
    # A tied parameter has several keys, of which one is enough.
    given = {id(entries[key].parameter) for key in entries.keys() & arrays.keys()}
    missing = sorted(key for key, named in entries.items() if key not in arrays and id(named.parameter) not in given)
    report = LoadReport(
        adapter_name=adapter.name,
        origin=str(tensors.origin),
        applied=tuple(in_file(prefix, named.key) for named, _ in pairs),
        missing_keys=tuple(missing),
        unexpected_keys=tuple(sorted(arrays.keys() - entries.keys())),
        mismatched=tuple(mismatched),
    )
    return Fit(report, tuple(pairs))


def check_rows(fitted: Fit, adapter: Adapter, saved: np.ndarray | None) -> None:
    """Write what a prompt's network is made of, and see that it makes the virtual tokens that were saved beside it.

    Args:
        fitted: how the tensors fit.
        adapter: still outside the model.
        saved: those virtual tokens; None checks nothing.

    Raises:
        LoadError: it makes others: something else has written one of the two files since.
    """
    if saved is None or adapter.prompt is None:
        return
    own = {id(p) for p in adapter.prompt.get_parameters()}
    for named, array in fitted.pairs:
        if id(named.parameter) in own:
            named.write(array)
    rows = adapter.prompt.rows()
    if rows.shape != saved.shape or not np.allclose(rows, saved, rtol=1e-2, atol=1e-2 * float(np.abs(saved).max())):
        raise LoadError(
            f"{fitted.report.origin} has other virtual tokens than the network in prompt_encoder.safetensors makes: "
            "the files are not of one adapter. Load it with is_trainable=False, or delete the latter."
        )


def _check_copies(pairs: Iterable[tuple[Named, np.ndarray]], origin: str) -> None:
    """Tensors of one weight, which several layers hold, must be equal; one of two tied layers has it turned."""
    first: dict[int, tuple[Named, np.ndarray]] = {}
    for named, array in pairs:
        held = array.T if named.turned else array
        other, values = first.setdefault(id(named.parameter), (named, held))
        if not np.array_equal(values, held, equal_nan=values.dtype.kind == "f"):
            raise LoadError(
                f"{origin}: {named.key} is another tensor than {other.key}, which is the same weight: their layers "
                "share it. Nothing was changed. The file is damaged."
            )


def _check_values(pairs: Iterable[tuple[Named, np.ndarray]], adapter: Adapter, origin: str) -> None:
    owners = {
        id(getattr(patch, attribute)): (patch, attribute)
        for patch in adapter.patches.values()
        for attribute in patch.keys
    }
    for named, array in pairs:
        patch, attribute = owners.get(id(named.parameter), (None, ""))
        try:
            if patch is not None:
                patch.check_values(attribute, array)
        except LoadError as error:
            raise LoadError(f"{origin}: {named.key}: {error}. Nothing was changed.") from error


def acts(patch: Patch) -> bool | None:
    """Whether a Patch changes what its layer computes; None if that cannot be told without running it.

    Cost: one weight-sized temporary.
    """
    if patch.dtype == ms.bfloat16:
        return None  # CPU has no arithmetic for it
    try:
        patch.check_mergeable()
    except MergeError:
        return None
    if patch.additive:
        return _differ(to_numpy(patch.delta_weight()), np.zeros((), np.float32))
    w, b = (None if p is None else Tensor(as_float32(to_numpy(p))) for p in (patch.site.weight, patch.site.bias))
    w = patch.site.from_storage(w)
    try:
        merged = patch.merged(w, b)
    except (MergeError, NotImplementedError):
        return None
    return any(_differ(to_numpy(new), to_numpy(old)) for new, old in zip(merged, (w, b)) if old is not None)


def _any(answers: Iterable[bool | None]) -> bool | None:
    """True at the first yes; None if one of them does not know; otherwise no."""
    unknown = False
    for answer in answers:
        if answer:
            return True
        unknown |= answer is None
    return None if unknown else False


def _differ(one: np.ndarray, other: np.ndarray) -> bool:
    return bool(np.any(as_float32(one) != as_float32(other)))


def _beside_patches(
    pairs: tuple[tuple[Named, np.ndarray], ...], adapter: Adapter, model: nn.Cell
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(new value, the base model's) of what is no Patch's weight: copies of layers, biases, embeddings."""
    originals: dict[str, Named] = {}
    hf_name = hf_names(model)
    for path in adapter.modules:
        cell = get_child(model, path)
        base = cell.base() if isinstance(cell, Wrapper) else cell
        for named in named_parameters(base, path, tied=True):
            owner, _, leaf = named.key.rpartition(".")
            originals[f"{hf_name(owner)}.{leaf}"] = named
    mine = {id(p) for patch in adapter.patches.values() for p in patch.get_parameters()}
    for named, array in pairs:
        if id(named.parameter) not in mine:
            yield array, originals.get(named.key, named).read()


def by_key(tensors: Tensors, adapter: Adapter, model: nn.Cell) -> dict[str, np.ndarray]:
    """The tensors by HF's keys and in HF's shapes; what is unknown keeps the key that it has.

    Known besides HF's keys are the same without their prefix, and parameter names under the adapter's name here or the
    one that it had when the tensors were stored: those of a MindSpore checkpoint or of `parameters_dict()`.

    Raises:
        LoadError: two tensors have the same key.
    """
    prefix = adapter.prefix
    entries = {in_file(prefix, key): named for key, named in adapter.accepted(model).items()}
    entries |= {prefix + key: named for key, named in embeddings_of(model, adapter).items()}
    known: dict[str, str] = {}
    for name in {"default", adapter.name, tensors.adapter or adapter.name}:
        for key, named in replace(adapter, name=name).accepted(model).items():
            known |= dict.fromkeys((named.local, prefix + named.local), in_file(prefix, key))
        known |= {f"prompt_encoder.{name}.prompt_embeddings": "prompt_embeddings"}
    known |= {key.removeprefix(PREFIX): key for key in entries} | {key: key for key in entries}
    arrays: dict[str, np.ndarray] = {}
    for name, array in tensors.arrays.items():
        # Files from old scripts may hold the adapter's name where HF's rule puts it.
        plain = re.sub(r"\.default(?=(\.[^.]+)?$)", "", name)
        key = known.get(name) or known.get(plain) or name
        if key in arrays:
            raise LoadError(f"{tensors.origin} has two tensors for {key}; one of them is called {name}.")
        arrays[key] = _in_hfs_shape(array, entries.get(key))
    return arrays


def _in_hfs_shape(array: np.ndarray, named: Named | None) -> np.ndarray:
    """The array, reshaped if it has the shape that MindSpore stores this parameter in."""
    if named is None or array.shape != tuple(named.parameter.shape) or array.size != math.prod(named.shape):
        return array
    return array.reshape(named.shape)


def as_arrays(state: Mapping[str, Tensor | np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of a state dict as arrays; Parameters, Tensors and arrays are taken.

    Raises:
        TypeError: it is no mapping, a key is no string, or a value none of these.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"a state dict is a mapping of names to tensors, got {type(state).__name__}")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor | np.ndarray):
            raise TypeError(
                f"a state dict holds Tensors, Parameters or numpy arrays by their names, got {type(value).__name__} "
                f"at {key!r}"
            )
    return {key: to_numpy(value) for key, value in state.items()}
