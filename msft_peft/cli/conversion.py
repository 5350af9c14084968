"""`msft-peft convert`: weights from one format to another."""

import argparse
import json
from pathlib import Path
from typing import Any

from msft_peft.errors import ConfigError
from msft_peft.hosts.name_maps import NAME_MAPS
from msft_peft.io.conversion import convert
from msft_peft.io.mindpet import mindpet_to_peft, peft_to_mindpet

_DESCRIPTION = """\
Convert weights between HuggingFace's files and MindSpore's checkpoints, without torch and without the model:

  .safetensors, .bin (torch)  ->  .ckpt, .safetensors
  .ckpt                       ->  .safetensors

The formats are told by the names' endings. An adapter's tensors get the keys that HF's files have, or the parameter
names that MindSpore's have; a whole model's keep their names. Torch's pickles are read by a reader that knows tensors
and runs nothing; none are written.

With --from mindpet a checkpoint of MindPet or MindFormers becomes an adapter's folder; with --to mindpet an adapter
becomes such a checkpoint, and the pet_config that goes with it is printed.
"""
_EPILOG = """\
  msft-peft convert old/adapter_model.bin new/adapter_model.safetensors
  msft-peft convert llama/model.safetensors llama.ckpt
  msft-peft convert --from mindpet --architecture llama --lora-alpha 16 rank_0/mindformers.ckpt my-adapter
  msft-peft convert --to mindpet --architecture llama my-adapter for_mindformers.ckpt > pet_config.json
"""


def add(commands: Any) -> None:
    """Add the command to a parser."""
    command = commands.add_parser(
        "convert",
        help="convert weights between safetensors, torch's .bin, MindSpore's .ckpt, and MindPet's",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("source", type=Path, help="what to read")
    command.add_argument("target", type=Path, help="what to write")
    command.add_argument("--adapter-name", default="default", help="in the names of a .ckpt; default: default")
    command.add_argument("--force", action="store_true", help="overwrite the target")
    mindpet = command.add_mutually_exclusive_group()
    mindpet.add_argument("--from", dest="origin", choices=["mindpet"], help="read a file of MindPet's or MindFormers'")
    mindpet.add_argument(
        "--to", dest="goal", choices=["mindpet"], help="the target is to be MindPet's or MindFormers'"
    )
    command.add_argument(
        "--architecture",
        choices=sorted(NAME_MAPS),
        help="rename MindFormers' layers to HF's, or back; with --from, --to",
    )
    command.add_argument("--lora-alpha", type=float, help="which the tensors do not tell; with --from")
    command.add_argument("--pet-config", type=Path, help="the pet_config or run configuration (.yaml); with --from")
    command.add_argument(
        "--modules-to-save", nargs="+", default=(), help="layers that were trained whole; with --from"
    )
    command.add_argument(
        "--prefix-layers", metavar="PATH", help="of each layer's PrefixLayer, as in blocks.{}.prefix; with --to"
    )
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Convert, and say what was written."""
    told = [name for name in ("lora_alpha", "pet_config", "modules_to_save") if getattr(arguments, name)]
    if told and not arguments.origin:
        raise ConfigError(f"--{told[0].replace('_', '-')} goes with --from mindpet alone")
    if arguments.prefix_layers and not arguments.goal:
        raise ConfigError("--prefix-layers goes with --to mindpet alone")
    if arguments.architecture and not (arguments.origin or arguments.goal):
        raise ConfigError("--architecture goes with --from mindpet or --to mindpet alone")
    target: Path = arguments.target
    if target.exists() and not arguments.force and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(f"'{target}' is there already. Pass --force to overwrite it.")
    if arguments.origin:
        made = mindpet_to_peft(
            arguments.source,
            target,
            config=arguments.pet_config,
            lora_alpha=arguments.lora_alpha,
            architecture=arguments.architecture,
            modules_to_save=arguments.modules_to_save,
        )
        print(f"{target}: a {made.peft_type} adapter from {arguments.source}")
    elif arguments.goal:
        block = peft_to_mindpet(
            arguments.source, target, architecture=arguments.architecture, prefix_layers=arguments.prefix_layers
        )
        print(json.dumps(block, indent=2))
    else:
        count = convert(arguments.source, target, arguments.adapter_name)
        print(f"{target}: {count} tensors from {arguments.source}")
