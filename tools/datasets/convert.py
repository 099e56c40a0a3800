"""Data sets to tables: python -m tools.datasets.convert KIND ROOT, as `opensora data convert`."""

import sys

from tools.door import passed_on

main = passed_on("data", "convert")

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
