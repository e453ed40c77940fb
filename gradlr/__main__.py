"""`python -m gradlr` is the command line of `gradlr.apps.cli`."""

import sys

from .apps.cli import main

if __name__ == "__main__":
    sys.exit(main())
