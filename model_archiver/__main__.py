"""Make `python -m model_archiver` the same as the installed `model-archiver` command."""

import sys

from model_archiver.cli import main

if __name__ == "__main__":
    sys.exit(main())
