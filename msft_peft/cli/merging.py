"""`msft-peft merge`: a checkpoint of the base model with the adapter merged into it."""

import argparse
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from msft_peft import auto
from msft_peft.backend.arrays import as_float32, to_numpy
from msft_peft.backend.hub import fetch_optional
from msft_peft.config import PeftConfig
from msft_peft.errors import MergeError
from msft_peft.model import PeftModel

_DESCRIPTION = """\
Merge an adapter into its base model and write an ordinary checkpoint in HuggingFace's layout: config.json and
safetensors, in shards above --max-shard-size. transformers, vLLM and others read it, and know of no adapter.
"""
_EPILOG = """\
  msft-peft merge path/to/llama my-adapter merged
  msft-peft merge facebook/opt-350m ybelkada/opt-350m-lora merged --dtype float16
"""
# What belongs to a model beside its weights, where it is there.
_BESIDE = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json vocab.txt merges.txt "
    "tokenizer.model spiece.model sentencepiece.bpe.model generation_config.json chat_template.jinja"
).split()


def add(commands: Any) -> None:
    """Add the command to a parser."""
    command = commands.add_parser(
        "merge",
        help="write the base model with an adapter merged into it",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("base", help="the base model: folder or Hub repository")
    command.add_argument("adapter", help="folder or Hub repository")
    command.add_argument("out", type=Path, help="the new folder")
    command.add_argument("--subfolder", help="folder below the adapter's")
    command.add_argument("--revision", help="branch, tag or commit of the adapter's repository")
    command.add_argument("--dtype", help="float32, float16 or bfloat16; default: the base model's own")
    command.add_argument("--max-shard-size", default="5GB", help="default: 5GB")
    command.add_argument("--provider", help="msft_peft, mindone, mindnlp or mindformers; default: the first that fits")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Load both, merge, write."""
    out: Path = arguments.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"'{out}' is there already and not empty. Name a new folder: nothing is overwritten.")
    adapter = {key: getattr(arguments, key) for key in ("subfolder", "revision") if getattr(arguments, key)}
    config = PeftConfig.from_pretrained(arguments.adapter, **adapter)
    if config.is_prompt_learning:
        raise MergeError(f"'{arguments.adapter}' puts virtual tokens before the input: there is nothing to merge.")
    config.base_model_name_or_path, config.revision = arguments.base, None
    kind = getattr(auto, f"Auto{PeftModel._for_task(config).__name__}")
    options = {key: getattr(arguments, key) for key in ("dtype", "provider") if getattr(arguments, key)}
    model = kind.from_pretrained(arguments.adapter, config=config, **adapter, **options)
    _check_finite(model)
    merged = model.merge_and_unload(safe_merge=True)
    merged.save_pretrained(out, max_shard_size=arguments.max_shard_size)
    for name in _BESIDE:
        # An adapter that brought tokens of its own has its own tokenizer.
        path = fetch_optional(arguments.adapter, name, **adapter) or fetch_optional(arguments.base, name)
        if path is not None:
            shutil.copyfile(path, out / name)
    size = sum(path.stat().st_size for path in out.iterdir())
    print(
        f"Merged {arguments.adapter} into {arguments.base}: {len(list(out.iterdir()))} files, {size:,} bytes in {out}"
    )


def _check_finite(model: PeftModel) -> None:
    """Raise MergeError, naming them, if weights of the base or of the adapter are not finite, adapted or not."""
    bad = [name for name, p in model.parameters_and_names() if not np.isfinite(as_float32(to_numpy(p))).all()]
    if bad:
        raise MergeError(f"there are numbers that are not finite in {', '.join(bad[:5])}{', ...' if bad[5:] else ''}")
