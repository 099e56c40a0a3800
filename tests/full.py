"""How many cases the large tests try: a few by default, all of them with OPENSORA_FULL=1, as the nightly run does."""

from __future__ import annotations

import os

FULL = os.environ.get("OPENSORA_FULL") == "1"


def count(few: int, many: int) -> int:
    return many if FULL else few
