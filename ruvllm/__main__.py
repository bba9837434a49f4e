"""`python -m ruvllm`: the command line."""

import sys

from ruvllm.cli import main

if __name__ == "__main__":
    sys.exit(main())
