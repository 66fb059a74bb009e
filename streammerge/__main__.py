"""`python -m streammerge`, the same program as `streammerge`."""

import sys

from streammerge.cli import main

if __name__ == "__main__":
    sys.exit(main())
