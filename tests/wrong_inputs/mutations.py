"""Random mistakes in files: in values of what a file says, and in its bytes."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

DEEP, LONG_NUMBER = "@deep@", "@long number@"  # no JSON writer writes these; `as_json` puts them in
HOSTILE = (
    None, True, False, -1, 0, 1, 2, 3.0, 0.5, -0.5, 1e308, float("nan"), float("inf"), 10**9, 10**18, 10**30,
    LONG_NUMBER, "", "x", "3", "None", "../../outside", "/etc/passwd", "/dev/zero", "a\0b", "a\x1b[31mb", "\udcff",
    "x" * 100_000, "a-" * 10_000, "http://127.0.0.1:1/x.png", [], {}, [[]], [None], {"type": "x"}, {"type": None}, DEEP,
    [10**9, 10**9], ["x"] * 3,
)  # fmt: skip
Path = tuple[str | int, ...]


def paths(value: Any, prefix: Path = ()) -> Iterator[Path]:
    """The places of all values in a nest of dicts and lists, itself included."""
    yield prefix
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, item in items:
        yield from paths(item, (*prefix, key))


def at(value: Any, path: Path) -> Any:
    for key in path:
        value = value[key]
    return value


def put(value: Any, path: Path, new: Any) -> Any:
    """A copy of the nest with another value at a place."""
    if not path:
        return new
    changed = copy.copy(list(value) if isinstance(value, tuple) else value)
    changed[path[0]] = put(changed[path[0]], path[1:], new)
    return changed


@st.composite
def mutated(draw: st.DrawFn, value: Any, most: int = 3) -> Any:
    """The nest with one to `most` mistakes: a value replaced, left out, added, wrapped, or swapped with another."""
    for _ in range(draw(st.integers(1, most))):
        places = list(paths(value))
        path = draw(st.sampled_from(places))
        action = draw(st.sampled_from(("replace", "replace", "replace", "remove", "add", "wrap", "swap")))
        here = at(value, path)
        if action == "remove" and path and isinstance(at(value, path[:-1]), dict):
            parent = {key: item for key, item in at(value, path[:-1]).items() if key != path[-1]}
            value = put(value, path[:-1], parent)
        elif action == "add" and isinstance(here, dict):
            key = draw(st.sampled_from(("x", "typ", "depht", "from_pretraind", "a\0b", "", "__class__")))
            value = put(value, path, {**here, key: draw(st.sampled_from(HOSTILE))})
        elif action == "wrap":
            value = put(value, path, draw(st.sampled_from(([here], {"type": here}, [here] * 50))))
        elif action == "swap":
            value = put(value, path, copy.deepcopy(at(value, draw(st.sampled_from(places)))))
        else:
            value = put(value, path, draw(st.sampled_from(HOSTILE)))
    return value


@st.composite
def damaged(draw: st.DrawFn, content: bytes, most: int = 3) -> bytes:
    """Bytes with one to `most` mistakes: cut off, flipped, taken out, put in, repeated, blanked."""
    for _ in range(draw(st.integers(1, most))):
        size = max(len(content), 1)
        # Heads decide more than bodies.
        begin = draw(st.one_of(st.integers(0, min(size, 256) - 1), st.integers(0, size - 1)))
        end = begin + draw(st.sampled_from((1, 2, 8, 64, 1024)))
        action = draw(st.sampled_from(("cut", "flip", "flip", "remove", "insert", "repeat", "blank")))
        if action == "cut":
            content = content[:begin]
        elif action == "flip":
            changed = bytearray(content)
            if begin < len(changed):
                changed[begin] ^= 1 << draw(st.integers(0, 7))
            content = bytes(changed)
        elif action == "remove":
            content = content[:begin] + content[end:]
        elif action == "insert":
            content = content[:begin] + draw(st.binary(min_size=1, max_size=16)) + content[begin:]
        elif action == "repeat":
            content = content[:end] + content[begin:end] * draw(st.sampled_from((1, 10, 200))) + content[end:]
        else:
            fill = draw(st.sampled_from((b"\0", b"\xff", b"{", b"[")))
            content = content[:begin] + fill * len(content[begin:end]) + content[end:]
    return content


def as_json(value: Any) -> bytes:
    """JSON of a nest, with what no writer of JSON writes put in."""
    text = json.dumps(value)
    text = text.replace(json.dumps(DEEP), "[" * 5000 + "]" * 5000).replace(json.dumps(LONG_NUMBER), "9" * 5000)
    return text.encode()


def as_config(value: Any) -> bytes:
    """A configuration file that says what a dict does."""
    if not isinstance(value, dict):
        value = {"value": value}
    lines = [f"{name} = {item!r}\n" for name, item in value.items()]
    text = "".join(lines).replace(repr(DEEP), "[" * 5000 + "]" * 5000).replace(repr(LONG_NUMBER), "9" * 5000)
    return text.encode("utf-8", "surrogateescape")
