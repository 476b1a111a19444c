"""`python -m stage_worker`."""

import sys

from stage_worker.cli import main

if __name__ == "__main__":
    sys.exit(main())
