"""Run the command line: ``python -m captum_xnn``."""

import sys

from captum_xnn.cli._parser import main

if __name__ == "__main__":
    sys.exit(main())
