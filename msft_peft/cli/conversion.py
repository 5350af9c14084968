"""`msft-peft convert`: tensors from one file format to another."""

import argparse
from pathlib import Path
from typing import Any

from msft_peft.io.conversion import convert

_DESCRIPTION = """\
Convert weights between HuggingFace's files and MindSpore's checkpoints, without torch and without the model:

  .safetensors, .bin (torch)  ->  .ckpt, .safetensors
  .ckpt                       ->  .safetensors

The formats are told by the names' endings. An adapter's tensors get the keys that HF's files have, or the parameter
names that MindSpore's have; a whole model's keep their names. Torch's pickles are read by a reader that knows tensors
and runs nothing; none are written.
"""
_EPILOG = """\
  msft-peft convert old/adapter_model.bin new/adapter_model.safetensors
  msft-peft convert adapter_model.ckpt adapter_model.safetensors
  msft-peft convert llama/model.safetensors llama.ckpt
"""


def add(commands: Any) -> None:
    """Add the command to a parser."""
    command = commands.add_parser(
        "convert",
        help="convert weights between safetensors, torch's .bin and MindSpore's .ckpt",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("source", type=Path, help="the file to read")
    command.add_argument("target", type=Path, help="the file to write")
    command.add_argument("--adapter-name", default="default", help="in the names of a .ckpt; default: default")
    command.add_argument("--force", action="store_true", help="overwrite the target")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Convert one file."""
    if arguments.target.exists() and not arguments.force:
        raise FileExistsError(f"'{arguments.target}' is there already. Pass --force to overwrite it.")
    count = convert(arguments.source, arguments.target, arguments.adapter_name)
    print(f"{arguments.target}: {count} tensors from {arguments.source}")
