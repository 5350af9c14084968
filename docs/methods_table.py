"""The table in docs/methods.md, from the registry: `python docs/methods_table.py` writes it."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mindspore import nn

from msft_peft import get_peft_model
from msft_peft.core.layer import TunerLayer
from msft_peft.core.patch import Patch
from msft_peft.models import LlamaConfig
from msft_peft.models.llama import LlamaAttention
from msft_peft.registry import METHODS, Method

PAGE = Path(__file__).parent / "methods.md"
BEGIN, END = "<!-- begin: methods_table.py -->", "<!-- end -->"
HEADS = ("method", "config", "kind", "formula", "trains", "layers", "identity at first", "merges", "mixed", "batched")
HEADS += ("source",)
WIDTH = 1024
# What a config needs to be told for one layer.
NEEDED: dict[str, dict[str, Any]] = {
    "ADAPTION_PROMPT": {"adapter_len": 10, "adapter_layers": 1},
    "ADALORA": {"total_step": 1000},
    "IA3": {"feedforward_modules": ["0"]},
    "TRAINABLE_TOKENS": {"token_indices": [0]},
}
# The layer that a row's numbers are of, where it is no dense one.
LAYERS: dict[str, Callable[[], nn.Cell]] = {
    "ADAPTION_PROMPT": lambda: LlamaAttention(LlamaConfig(hidden_size=WIDTH, num_attention_heads=16)),
    "LN_TUNING": lambda: nn.LayerNorm((WIDTH,)),
}


def table() -> str:
    """The rows of all registered methods, as Markdown."""
    rows = [HEADS, ("---",) * len(HEADS), *(_row(method) for _, method in sorted(METHODS.items()) if method.patches)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _row(method: Method) -> tuple[str, ...]:
    kinds = [kind for kind in ("dense", "embedding", "conv1d", "conv2d", "conv3d") if kind in method.patches]
    others = sorted(set(method.patches) - set(kinds))
    patch = method.patches.get("dense") or method.patches[(kinds + others)[0]]
    formula = _text(patch).partition("\n\n")[0].replace("\n", " ").replace("|", "\\|")
    texts = f"{_text(method.config)}\n\n{_text(patch)}"
    source = re.search(r"Source: (.*?)(?:\n\n|\n[A-Z]\w+:|$)", texts, re.DOTALL)
    says = {True: "yes", False: "no"}
    layer = LAYERS.get(method.name, lambda: nn.Dense(WIDTH, WIDTH))()
    config = method.config(target_modules=["0"], **NEEDED.get(method.name, {}))
    model = get_peft_model(nn.SequentialCell(layer), config)
    (example,) = (cell.adapters["default"] for _, cell in model.cells_and_names() if isinstance(cell, TunerLayer))
    kind = _kind(example)
    return (
        method.name,
        f"`{method.config.__name__}`",
        kind,
        formula,
        f"{model.get_nb_trainable_parameters()[0]:,}",
        ", ".join(kinds + others),
        says[method.identity_at_init],
        says[method.merges],
        says[method.mixed],
        "one pass" if example.batched_rank else "a pass each",
        " ".join(source.group(1).split()) if source else "",
    )


def _kind(patch: Patch) -> str:
    """What it does to its layer, by the hooks that it has."""
    if patch.shared is not None and patch.shared.keys:
        return "adds to the weight, with weights that all layers share"
    if patch.replaces:
        return "takes the layer's place"
    if type(patch).before is not Patch.before:
        return "changes the input"
    if patch.additive:
        return "adds to the weight"
    return "builds on the weight" if patch.reads_base else "changes the output"


def _text(thing: type) -> str:
    return inspect.getdoc(thing) or ""


def page(text: str) -> str:
    """The page `text` with the table as it is now."""
    head, _, rest = text.partition(BEGIN)
    return f"{head}{BEGIN}\n\n{table()}\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
