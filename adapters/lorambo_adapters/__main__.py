"""`python -m lorambo_adapters` is the `lorambo` command; `torchrun` runs it by this name."""

import sys

from lorambo_adapters.cli import main

if __name__ == "__main__":
    sys.exit(main())
