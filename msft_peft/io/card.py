"""The model card: README.md beside an adapter, for people, with the metadata that the Hub reads."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from msft_peft.backend.files import write_text
from msft_peft.backend.hub import repository_id
from msft_peft.config import HF_PEFT_VERSION, PeftConfig, TaskType

CARD_NAME = "README.md"

_BODY = """
# Adapter for {base}

{what} of **{trained:,}** weights, made with `msft_peft`: HuggingFace PEFT's API and file format on MindSpore.

{settings}

## Use it

On MindSpore:

```python
{ours}
```

On torch:

```python
{theirs}
```

### Framework versions

- PEFT {version}
"""
_NAMED = """\
from {library} import {auto}

model = {auto}.from_pretrained("{where}")"""
_NAMELESS = """\
from {library} import PeftModel

model = PeftModel.from_pretrained(base_model, "{where}")  # base_model: the model that it was trained on"""

# What is told of a config whether or not it was left at its default; of the other fields, what was changed.
_TELLING = ("r", "lora_alpha", "target_modules", "num_virtual_tokens")
_SAID_ELSEWHERE = {field.name for field in dataclasses.fields(PeftConfig)}
_RESULTS = re.compile(r"\n*<!-- results -->.*?<!-- /results -->\n*", re.DOTALL)


@dataclass(frozen=True)
class About:
    """What a card tells.

    Attributes:
        config: the adapter's; None for a folder without one.
        base: the base model's name, if it has one.
        trained: the number of the adapter's weights.
        auto: the class that loads it with its base model by name; None where there is none.
        pipeline: the Hub's pipeline tag, if it is known.
        tags: further tags.
        where: what a reader has to pass to `from_pretrained`.
        metrics: results, by name.
    """

    config: PeftConfig | None
    base: str | None
    trained: int
    auto: str | None = None
    pipeline: str | None = None
    tags: Sequence[str] = ()
    where: str = "this folder or repository"
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def method(self) -> str:
        return "PEFT" if self.config is None else str(self.config.peft_type)


def write_card(directory: Path, about: About) -> None:
    """Write README.md, or bring the metadata and the results of the one that is there up to date.

    All other text that is there is left alone. A base model that is a local folder is named in the text, but not in
    the metadata: the Hub takes only its own models' names there, and refuses the whole upload otherwise.
    """
    path = directory / CARD_NAME
    if path.is_file():
        card = ModelCard.load(path, ignore_metadata_errors=True)
    else:
        card = ModelCard(f"---\n{ModelCardData().to_yaml()}\n---\n{_body(about)}")
    base = repository_id(about.base)
    card.data.library_name = "peft"
    if base:
        card.data.base_model = base
    if about.pipeline and not card.data.pipeline_tag:
        card.data.pipeline_tag = about.pipeline
    wanted = {about.method.lower(), "mindspore", *about.tags} | ({f"base_model:adapter:{base}"} if base else set())
    card.data.tags = sorted(wanted | set(card.data.tags or []))
    if about.metrics:
        card.data.metrics = sorted({*(card.data.metrics or []), *about.metrics})
        card.text = _with_results(card.text, about.metrics)
    write_text(path, str(card))


def with_metadata_of(path: Path, other: Path) -> None:
    """Keep the text of one card, and bring its metadata up to date with those of another; tags are put together."""
    card, newer = (ModelCard.load(one, ignore_metadata_errors=True) for one in (path, other))
    tags = sorted({*(card.data.tags or []), *(newer.data.tags or [])})
    for name, value in newer.data.to_dict().items():
        setattr(card.data, name, value)
    card.data.tags = tags or None
    write_text(path, str(card))


def _body(about: About) -> str:
    code = _NAMED if about.auto and about.base else _NAMELESS
    task = getattr(about.config, "task_type", None)
    blanks = {"auto": about.auto, "where": about.where}
    return _BODY.format(
        base=about.base or "a MindSpore model",
        what=f"A {about.method} adapter" + (f" for {TaskType(task).value}" if task else ""),
        trained=about.trained,
        settings=_table(("setting", "value"), _settings(about.config)),
        ours=code.format(library="msft_peft", **blanks),
        theirs=code.format(library="peft", **blanks),
        version=HF_PEFT_VERSION,
    )


def _settings(config: PeftConfig | None) -> dict[str, Any]:
    """The fields of a config that say what the adapter is."""
    told: dict[str, Any] = {}
    if config is None:
        return told
    plain = config.to_dict()
    for entry in dataclasses.fields(config):
        value = plain.get(entry.name)  # runtime settings are not told
        default = entry.default_factory() if callable(entry.default_factory) else entry.default
        changed = entry.name not in _SAID_ELSEWHERE and value not in (default, None) and not isinstance(value, dict)
        if changed or (entry.name in _TELLING and value is not None):
            told[entry.name] = briefly(value)
    return told


def briefly(value: Any) -> Any:
    """A setting in a line: of a long list of paths their last parts, and how many there are."""
    if not isinstance(value, list):
        return value
    if len(value) <= _LONG:
        return ", ".join(map(str, value))
    last = sorted({str(item).rpartition(".")[2] for item in value})
    return ", ".join(last[:_LONG]) + (", ..." if len(last) > _LONG else "") + f" ({len(value)} of them)"


_LONG = 8


def _with_results(text: str, metrics: Mapping[str, float]) -> str:
    """The text with a table of `metrics`, in the place of the one that this function wrote before, or at its end."""
    rows = {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in sorted(metrics.items())}
    table = f"\n\n<!-- results -->\n## Results\n\n{_table(('metric', 'value'), rows)}\n<!-- /results -->\n\n"
    if _RESULTS.search(text):
        return _RESULTS.sub(lambda _: table, text, count=1).rstrip("\n") + "\n"
    before, mark, after = text.partition("### Framework versions")
    return before.rstrip("\n") + table + mark + after if mark else (text.rstrip("\n") + table).rstrip("\n") + "\n"


def _table(head: tuple[str, str], rows: Mapping[str, Any]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    return "\n".join([*lines, *(f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items())])


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
