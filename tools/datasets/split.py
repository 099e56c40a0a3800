"""Rows of each bucket: python -m tools.datasets.split TABLE ..., as `opensora data split`."""

import sys

from tools.door import passed_on

main = passed_on("data", "split")

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
