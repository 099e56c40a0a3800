"""python -m opensora.cli"""

import sys

from opensora.cli import main

if __name__ == "__main__":
    sys.exit(main())
