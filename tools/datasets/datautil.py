"""Everything on tables: python -m tools.datasets.datautil TABLE ..., as `opensora data edit`."""

import sys

from tools.door import passed_on

main = passed_on("data", "edit")

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
