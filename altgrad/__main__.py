"""`python -m altgrad` is the `altgrad` command."""

import sys

from altgrad.cli import main

if __name__ == "__main__":
    sys.exit(main())
