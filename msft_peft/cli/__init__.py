"""The command line: `msft-peft COMMAND`, or `python -m msft_peft COMMAND`."""

import argparse
import sys
import warnings
from collections.abc import Sequence

from msft_peft.cli import conversion, finetuning, generation, inspection, merging, pushing
from msft_peft.errors import PeftError

_COMMANDS = (inspection, merging, conversion, generation, finetuning, pushing)

_DESCRIPTION = """\
Adapters for MindSpore models, in HuggingFace PEFT's format: look at them, merge, convert, try, train and publish them.

Wherever an adapter or a model is asked for, give a folder or the name of a Hub repository (HF_TOKEN says who you are).
"""
_EPILOG = """\
exit codes: 0 done; 1 an error, told in one message; 2 a mistake in the command line; 130 interrupted
"""


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(
        "msft-peft", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("--traceback", action="store_true", help="show where in the code an error arose")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add(commands)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; errors that a user can mend are told without a traceback."""
    parsed = parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: print(f"msft-peft: warning: {message}", file=sys.stderr)
            return parsed.run(parsed) or 0
    except KeyboardInterrupt:
        print("msft-peft: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `msft-peft inspect ... | head`
        sys.stderr.close()
        return 0
    except (PeftError, OSError, ValueError, TypeError, NotImplementedError) as error:
        if parsed.traceback:
            raise
        print(f"msft-peft: error: {str(error) or type(error).__name__}", file=sys.stderr)
        return 1
