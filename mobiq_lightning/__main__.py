"""``python -m mobiq_lightning``."""

import sys

from mobiq_lightning.cli import main

if __name__ == "__main__":
    sys.exit(main())
