"""The command line: `python -m jaxquant --help`."""

import sys

from jaxquant.deploy.cli import main

if __name__ == "__main__":
    sys.exit(main())
