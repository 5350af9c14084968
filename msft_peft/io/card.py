"""The model card: README.md beside an adapter, with the metadata that the Hub reads."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from msft_peft.backend.files import replacing
from msft_peft.config import HF_PEFT_VERSION

_BODY = """
# Adapter for {base}

A {method} adapter made with `msft_peft` (HuggingFace PEFT's API and file format on MindSpore): {trainable:,} weights.

```python
from msft_peft import PeftModel  # on MindSpore; on torch: from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "this folder or repository")
```

### Framework versions

- PEFT {version}
"""


def write_card(
    directory: Path, base: str | None, method: str, trainable: int, tags: Sequence[str], pipeline: str | None
) -> None:
    """Write README.md, or bring the metadata of the one that is there up to date and leave its text alone.

    Args:
        directory: where.
        base: the base model's name, if it has one.
        method: the PEFT method's name.
        trainable: number of the adapter's weights.
        tags: further tags.
        pipeline: the Hub's pipeline tag, if it is known.
    """
    path = directory / "README.md"
    if path.is_file():
        card = ModelCard.load(path, ignore_metadata_errors=True)
    else:
        data = ModelCardData()
        text = _BODY.format(
            base=base or "a MindSpore model", method=method, trainable=trainable, version=HF_PEFT_VERSION
        )
        card = ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")
    card.data.library_name = "peft"
    if base:
        card.data.base_model = base
    if pipeline and not card.data.pipeline_tag:
        card.data.pipeline_tag = pipeline
    wanted = {method.lower(), "mindspore", *tags} | ({f"base_model:adapter:{base}"} if base else set())
    card.data.tags = sorted(wanted | set(card.data.tags or []))
    with replacing(path) as temporary:
        temporary.write_text(str(card), encoding="utf-8")
