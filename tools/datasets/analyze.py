"""Figures of a table: python -m tools.datasets.analyze TABLE, as `opensora data analyze`."""

import sys

from tools.door import passed_on

main = passed_on("data", "analyze")

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
