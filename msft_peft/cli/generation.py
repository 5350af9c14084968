"""`msft-peft generate`: what a model says, with an adapter or without."""

import argparse
import json
import sys
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from msft_peft import auto
from msft_peft.backend.hub import fetch
from msft_peft.config import CONFIG_NAME, PeftConfig
from msft_peft.errors import ConfigError
from msft_peft.hosts.text import Text, open_tokenizer
from msft_peft.model import PeftModel
from msft_peft.models import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

_DESCRIPTION = """\
Continue a text, or answer it: by an adapter (its base model is found by name, or given with --base), or by a model
alone.

Texts need a tokenizer: tokenizer.json beside the adapter or the model, read by `tokenizers` (or transformers), or
--tokenizer FOLDER; --tokenizer bytes takes one token a byte. Without one, give token ids and get token ids.
"""
_EPILOG = """\
  msft-peft generate my-adapter "Preheat the oven to 350 degrees and place the cookie dough" --max-new-tokens 50
  msft-peft generate my-adapter --base path/to/llama --ids 1,15043,3186
  echo "Once upon a time" | msft-peft generate path/to/llama - --sample --temperature 0.8 --seed 1
"""


def add(commands: Any) -> None:
    """Add the command to a parser."""
    command = commands.add_parser(
        "generate",
        help="continue a text, by a model with an adapter or without",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("model", help="an adapter, or a model: folder or Hub repository")
    prompt = command.add_mutually_exclusive_group(required=True)
    prompt.add_argument("prompt", nargs="?", help="the text to continue; - reads it from the standard input")
    prompt.add_argument("--ids", type=_ids, help="token ids in the place of a text: 1,15043,3186")
    command.add_argument("--base", help="the base model, in the place of the one that the adapter names")
    command.add_argument("--tokenizer", help="folder or Hub repository of the tokenizer, or: bytes")
    command.add_argument("--dtype", help="of the base model: float32, float16 or bfloat16")
    command.add_argument("--max-new-tokens", type=int, default=50, metavar="N", help="default: 50")
    command.add_argument("--sample", action="store_true", help="draw the tokens; default: the most probable ones")
    command.add_argument("--temperature", type=float, default=1.0, help="of --sample; default: 1")
    command.add_argument("--top-k", type=int, default=50, help="of --sample; default: 50")
    command.add_argument("--top-p", type=float, default=1.0, help="of --sample; default: 1")
    command.add_argument("--seed", type=int, help="makes --sample repeat")
    command.add_argument("--json", action="store_true", help="print prompt and continuation, tokens and text, as JSON")
    command.set_defaults(run=run)


def _ids(text: str) -> list[int]:
    try:
        return [int(token) for token in text.replace(",", " ").split()]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no list of token ids such as 1,2,3") from None


def run(arguments: argparse.Namespace) -> None:
    """Generate and print."""
    hurry()
    model, sources = load(arguments.model, arguments.base, arguments.dtype)
    text = _tokenizer(arguments.tokenizer, sources, needed=arguments.ids is None)
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    ids = arguments.ids if text is None or arguments.ids is not None else text.encode(prompt)
    if not ids:
        raise ConfigError("the prompt is empty: there is nothing to continue")
    settings = (model.get_base_model() if isinstance(model, PeftModel) else model).config
    _check_range(ids, settings.vocab_size)
    found = model.generate(
        Tensor(np.array([ids], np.int32)),
        max_new_tokens=arguments.max_new_tokens,
        do_sample=arguments.sample,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    # An encoder-decoder gives an answer alone, after the token that it starts with.
    answers = getattr(settings, "is_encoder_decoder", False)
    new = [int(token) for token in found.asnumpy()[0][1 if answers else len(ids) :]]
    said = None if text is None else text.decode(new)
    if arguments.json:
        print(json.dumps({"prompt": prompt, "prompt_ids": ids, "new_ids": new, "text": said}, ensure_ascii=False))
    else:
        before = "" if answers or prompt is None else prompt.rstrip("\n")
        print(",".join(map(str, new)) if said is None else before + said)


def hurry() -> None:
    """On CPU, run PyNative's operations one after the other: some ten times faster. Before the first of them."""
    if ms.get_context("device_target") == "CPU":
        ms.runtime.launch_blocking()


def load(name: str, base: str | None, dtype: str | None) -> tuple[nn.Cell, list[str]]:
    """A model that generates, and where its tokenizer may be: with an adapter if `name` is one's."""
    options = {} if dtype is None else {"dtype": dtype}
    if fetch(name, CONFIG_NAME) is None:
        if base is not None:
            raise ConfigError(f"'{name}' holds no {CONFIG_NAME}: it is no adapter, so --base has no meaning")
        config = AutoConfig.from_pretrained(name)
        auto_model = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        return auto_model.from_pretrained(name, **options), [name]
    adapter = PeftConfig.from_pretrained(name)
    if base is not None:
        adapter.base_model_name_or_path, adapter.revision = base, None
    kind = getattr(auto, f"Auto{PeftModel._for_task(adapter).__name__}")
    model = kind.from_pretrained(name, config=adapter, **options)
    return model, [name, str(adapter.base_model_name_or_path)]


def _tokenizer(chosen: str | None, sources: list[str], needed: bool) -> Text | None:
    for source in [chosen] if chosen else sources:
        found = open_tokenizer(source) if needed or chosen else None
        if found is not None:
            return found
    if needed:
        raise ConfigError(
            f"none of {', '.join(repr(source) for source in sources)} has a tokenizer. Name its folder with "
            "--tokenizer, or give token ids with --ids."
        )
    return None


def _check_range(ids: list[int], size: int) -> None:
    strange = [token for token in ids if not 0 <= token < size]
    if strange:
        raise ConfigError(f"the model has the tokens 0 to {size - 1}; the prompt has {strange[:5]}")
