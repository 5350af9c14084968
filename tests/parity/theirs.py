"""HF peft's side of a comparison."""

import contextlib
import io
from pathlib import Path

import numpy as np
import peft
import torch
from peft import PeftModel, get_peft_model

from . import modules
from .cases import Case, Record, file_key, make_input, make_weight


def build(net: str, weights: dict[str, np.ndarray]) -> torch.nn.Module:
    """The net of that name with these weights."""
    module = modules.NETS[net]()
    module.load_state_dict({key: torch.tensor(value) for key, value in weights.items()})
    return module


def data(case: Case, seed: int = 0) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """(weights of the base, a batch, a target of the outputs' shape) for a case, random."""
    rng = case.rng(seed)
    module = modules.NETS[case.net]()
    weights = {key: make_weight(key, tuple(value.shape), rng) for key, value in module.state_dict().items()}
    x = make_input(case.net, rng)
    with torch.no_grad():
        shape = module(torch.tensor(x)).shape
    return weights, x, rng.normal(size=tuple(shape)).astype(np.float32)


def create(case: Case, weights: dict[str, np.ndarray], seed: int = 0, adapter: str = "default") -> PeftModel:
    """The net with an adapter, its weights random, in evaluation mode."""
    config = getattr(peft, f"{case.method}Config")(**case.config)
    model = get_peft_model(build(case.net, weights), config, adapter_name=adapter)
    rng = case.rng(seed + 1000)
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.data = torch.tensor(make_weight(name, tuple(p.shape), rng)).to(p.dtype)
    return model.eval()


def fill(p: torch.nn.Parameter, value: float) -> None:
    """Write one number everywhere."""
    p.data.fill_(value)


def forward(model: PeftModel, x: np.ndarray) -> torch.Tensor:
    """The output for a batch, past the task classes, which want a transformers model."""
    # Of a net that is called without tasks all rows are of the first.
    more = {"task_ids": torch.zeros(len(x), dtype=torch.long)} if model.peft_type == "POLY" else {}
    return model.base_model(torch.tensor(x), **more)


def gradients(model: PeftModel, x: np.ndarray, target: np.ndarray, adapter: str = "default"):
    """(loss, output, gradients of all that trains by key in HF's files)."""
    model.zero_grad()
    y = forward(model, x)
    loss = ((y - torch.tensor(target)) ** 2).mean()
    loss.backward()
    named = {file_key(n, adapter): gradient(p) for n, p in model.named_parameters() if p.requires_grad}
    return loss.item(), y.detach().numpy(), named


def gradient(p: torch.nn.Parameter) -> np.ndarray:
    """Zero where it had no part in the output."""
    return (torch.zeros_like(p) if p.grad is None else p.grad).numpy().copy()


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
        with torch.no_grad():
            merged = model.merge_and_unload()
            found.merged_output = merged(torch.tensor(x)).numpy()
        found.merged = {key: value.numpy().copy() for key, value in merged.state_dict().items()}
    return found


def write(case: Case, folder: Path, seed: int = 0):
    """Let HF save a random adapter of the case; return (weights of the base, batch, target, record)."""
    weights, x, target = data(case, seed)
    model = create(case, weights, seed)
    model.save_pretrained(folder)
    return weights, x, target, record(model, x, target, case.merges)
