"""The table in docs/methods.md, from the registry: `python docs/methods_table.py` writes it."""

import inspect
import re
from pathlib import Path

from msft_peft.registry import METHODS, Method

PAGE = Path(__file__).parent / "methods.md"
BEGIN, END = "<!-- begin: methods_table.py -->", "<!-- end -->"
HEADS = ("method", "config", "formula", "layers", "identity at first", "merges", "mixed", "source")


def table() -> str:
    """The rows of all registered methods, as Markdown."""
    rows = [HEADS, ("---",) * len(HEADS), *(_row(method) for _, method in sorted(METHODS.items()) if method.patches)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _row(method: Method) -> tuple[str, ...]:
    kinds = [kind for kind in ("dense", "embedding", "conv1d", "conv2d", "conv3d") if kind in method.patches]
    others = sorted(set(method.patches) - set(kinds))
    patch = method.patches.get("dense") or method.patches[(kinds + others)[0]]
    formula = _text(patch).partition("\n\n")[0].replace("\n", " ").replace("|", "\\|")
    source = re.search(r"Source: (.*?)(?:\n\n|\n[A-Z]\w+:|$)", _text(method.config), re.DOTALL)
    says = {True: "yes", False: "no"}
    return (
        method.name,
        f"`{method.config.__name__}`",
        formula,
        ", ".join(kinds + others),
        says[method.identity_at_init],
        says[method.merges],
        says[method.mixed],
        " ".join(source.group(1).split()) if source else "",
    )


def _text(thing: type) -> str:
    return inspect.getdoc(thing) or ""


def page(text: str) -> str:
    """The page `text` with the table as it is now."""
    head, _, rest = text.partition(BEGIN)
    return f"{head}{BEGIN}\n\n{table()}\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
