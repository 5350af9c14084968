"""`python -m msft_peft`: the command line."""

import sys

from msft_peft.cli import main

if __name__ == "__main__":
    sys.exit(main())
