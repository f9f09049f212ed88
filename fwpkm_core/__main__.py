"""``python -m fwpkm`` is the command ``fwpkm``."""

import sys

from fwpkm.cli import main

if __name__ == "__main__":
    sys.exit(main())
