"""`python -m gradlr` is the command line of `gradlr.cli`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
