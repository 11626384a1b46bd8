"""Run the command line: ``python -m captum_xnn``."""

import sys

from captum_xnn.cli import main

if __name__ == "__main__":
    sys.exit(main())
