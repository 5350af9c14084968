"""`msft-peft push`: a saved adapter or model onto the Hub."""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from msft_peft.backend.hub import Target
from msft_peft.config import CONFIG_NAME
from msft_peft.io.card import CARD_NAME, with_metadata_of
from msft_peft.models.checkpoint import CONFIG_FILE

_DESCRIPTION = """\
Upload a folder that save_pretrained wrote (an adapter or a model) in one commit: all of it is there afterwards, or
nothing. A README.md on the Hub keeps its text; its metadata are brought up to date. Hidden files, links and the
checkpoints of `finetune` stay here.
"""
_EPILOG = """\
  msft-peft push my-adapter you/my-lora --private
  msft-peft push my-adapter someone/their-lora --create-pr --message "Trained longer"
"""


def add(commands: Any) -> None:
    """Add the command to a parser."""
    command = commands.add_parser(
        "push",
        help="upload a saved adapter or model to the Hub",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("folder", type=Path, help="what save_pretrained wrote")
    command.add_argument("repo", help="owner/name, or a name in your own account; made if it is not there")
    command.add_argument("--private", action="store_true", default=None, help="make a private repository")
    command.add_argument("--revision", help="a branch, made if it is not there; default: main")
    command.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    command.add_argument("--message", default="Upload with msft-peft", help="of the commit")
    command.add_argument("--token", help="who you are; default: HF_TOKEN, or who is logged in")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Upload, and say where it is."""
    folder: Path = arguments.folder
    if not any((folder / name).is_file() for name in (CONFIG_NAME, CONFIG_FILE)):
        raise FileNotFoundError(
            f"'{folder}' holds no saved adapter or model: neither {CONFIG_NAME} nor {CONFIG_FILE}."
        )
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if _belongs(path, folder)}
    target = Target(arguments.repo, arguments.token, arguments.private, arguments.revision, arguments.create_pr)
    with tempfile.TemporaryDirectory() as scratch:
        if CARD_NAME in files and target.copy(CARD_NAME, Path(scratch)):
            card = Path(scratch) / CARD_NAME
            with_metadata_of(card, files[CARD_NAME])
            files[CARD_NAME] = card
        commit = target.commit_files(files, arguments.message)
    print(commit.pr_url or commit.commit_url)


def _belongs(path: Path, folder: Path) -> bool:
    parts = path.relative_to(folder).parts
    hidden = any(part.startswith((".", "checkpoint-")) for part in parts)
    return path.is_file() and not path.is_symlink() and not hidden
