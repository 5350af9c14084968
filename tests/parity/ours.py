"""msft_peft's side of a comparison."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import nn, ops

import msft_peft
from msft_peft import PeftModel, get_peft_model

from . import cells
from .cases import Case, Record, file_key, make_weight

_TORCH_LEAVES = {"gamma": "weight", "beta": "bias", "embedding_table": "weight"}


def torch_key(name: str) -> str:
    """A parameter's name as torch's modules would have it."""
    owner, _, leaf = name.rpartition(".")
    return f"{owner}.{_TORCH_LEAVES.get(leaf, leaf)}".lstrip(".")


def build(net: str, weights: dict[str, np.ndarray]) -> nn.Cell:
    """The net of that name, with weights given under torch's names."""
    cell = cells.NETS[net]()
    for name, p in cell.parameters_and_names():
        p.set_data(ms.Tensor(weights[torch_key(name)].reshape(p.shape)))
    return cell


def weights_of(cell: nn.Cell) -> dict[str, np.ndarray]:
    """All weights under torch's names and in torch's shapes."""
    found = {torch_key(name): p.asnumpy().copy() for name, p in cell.parameters_and_names()}
    for path, layer in cell.cells_and_names():
        if isinstance(layer, nn.Conv1d):  # (out, in, 1, kernel)
            found[f"{path}.weight"] = found[f"{path}.weight"][:, :, 0]
    return found


def load(case: Case, weights: dict[str, np.ndarray], folder: str | Path, **options) -> PeftModel:
    """The net with the adapter in `folder`, trainable, in evaluation mode."""
    model = PeftModel.from_pretrained(build(case.net, weights), folder, is_trainable=True, **options)
    return model.set_train(False)


def create(case: Case, weights: dict[str, np.ndarray], seed: int = 0) -> PeftModel:
    """The net with an adapter of our own, its weights random, in evaluation mode."""
    model = get_peft_model(build(case.net, weights), getattr(msft_peft, f"{case.method}Config")(**case.config))
    rng = case.rng(seed)
    for p in model.trainable_params():
        p.copy_(ms.Tensor(make_weight(p.name, p.shape, rng)))
    return model.set_train(False)


def fill(p: ms.Parameter, value: float) -> None:
    """Write one number everywhere."""
    p.copy_(ms.Tensor(np.full(p.shape, value, np.float32)))


class Loss(nn.Cell):
    """Mean squared error against a fixed target, and the output."""

    def __init__(self, model: nn.Cell, target: np.ndarray):
        super().__init__(auto_prefix=False)
        self.model, self.target = model, ms.Tensor(target)

    def construct(self, x):
        y = self.model(x)
        return ops.mean(ops.square(y - self.target)), y


def gradients(model: PeftModel, x: np.ndarray, target: np.ndarray, adapter: str = "default"):
    """(loss, output, gradients of all that trains by key in HF's files)."""
    params = model.trainable_params()
    (loss, y), grads = ms.value_and_grad(Loss(model, target), None, params, has_aux=True)(ms.Tensor(x))
    named = {torch_key(file_key(p.name, adapter)): g.asnumpy() for p, g in zip(params, grads)}
    return float(loss.asnumpy()), y.asnumpy(), named


def printed(model: PeftModel) -> str:
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        model.print_trainable_parameters()
    return text.getvalue().strip()


def record(model: PeftModel, x: np.ndarray, target: np.ndarray, merge: bool = True) -> Record:
    """What becomes of the batch; the model is merged for good at the end."""
    text, counts = printed(model), model.get_nb_trainable_parameters()
    loss, y, grads = gradients(model, x, target)
    found = Record(y, loss, grads, *counts, text)
    if merge:
        model.merge_adapter()
        found.merged_output = model(ms.Tensor(x)).asnumpy()
        model.unmerge_adapter()
        found.merged = weights_of(model.merge_and_unload())
    return found


def tensors_of(path: Path) -> tuple[dict[str, tuple[str, tuple[int, ...], bytes]], dict[str, str]]:
    """A safetensors file as {key: (dtype, shape, bytes)} and its metadata, read without any library's help."""
    raw = Path(path).read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    metadata = header.pop("__metadata__", {})
    found = {
        key: (info["dtype"], tuple(info["shape"]), data[slice(*info["data_offsets"])]) for key, info in header.items()
    }
    return found, metadata


def without_copies(tensors: dict[str, Any]) -> dict[str, Any]:
    """The tensors but for those that HF writes again.

    RandLoRA's are at each layer as they stand beside the base model; of Lily's equal ones the first is left.
    """
    found, factors = {}, []
    for key, tensor in sorted(tensors.items()):
        factor = (key.rpartition("lily_")[2], tensor)
        if "lily_" in key and factor in factors:
            continue
        factors.append(factor)
        shared = f"base_model.{key.rpartition('.')[2]}"
        if key == shared or shared not in tensors:
            found[key] = tensor
        else:
            assert tensor == tensors[shared]
    return found


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    """The float32 tensors of a safetensors file."""
    tensors, _ = tensors_of(path)
    return {key: np.frombuffer(data, np.float32).reshape(shape) for key, (_, shape, data) in tensors.items()}


def config_in(folder: Path) -> dict:
    """adapter_config.json with the lists that HF holds as sets in order, since theirs changes from run to run."""
    fields = json.loads((Path(folder) / "adapter_config.json").read_text())
    for name in ("target_modules", "exclude_modules", "modules_to_save", "feedforward_modules"):
        if isinstance(fields.get(name), list):
            fields[name] = sorted(fields[name])
    if fields["auto_mapping"]:
        fields["auto_mapping"].pop("parent_library")  # each names its own module
    return fields
