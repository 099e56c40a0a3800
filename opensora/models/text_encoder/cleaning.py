"""Text cleaning before a text encoder: the rules of the captions that T5-conditioned models were trained on.

The rules follow the caption cleaning that DeepFloyd IF and PixArt describe; their order matters, and so does applying
them twice (the first pass turns `&lt;tag&gt;` into `<tag>`, the second drops it). A model sees only cleaned text, so
they are kept as they are, oddities included: CJK ideographs vanish, `+` becomes a space, "downloaded" becomes "ed".
Each rule is written so that a text, whatever it is made of, takes time in proportion to its length.
"""

from __future__ import annotations

import html
import re
from urllib.parse import unquote_plus

_DOMAIN = r"[a-z0-9.-]+\.(?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
_FILE_TYPE = r"(?:png|jpe?g|bmp|webp|eps|pdf|apk|mp4)"
_DASHES = r"-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0"
_DASHES += r"\ufe31\ufe32\ufe58\ufe63\uff0d"

_SCHEMES = tuple(re.compile(rf"{scheme}:(?:/{{1,3}}|[a-z0-9%])") for scheme in ("https?", "www"))
_WORD_EDGE, _NAME, _ADDRESS = re.compile(r"\b"), re.compile(r"[a-z0-9.-]+"), re.compile(_DOMAIN)

# each rule: what is found, what takes its place
_CHARACTERS = (
    (r"@\w+", ""),  # @nickname
    (r"[\u31c0-\u9fff]+", ""),  # CJK strokes, enclosed and squared letters, hexagrams, ideographs
    (rf"[{_DASHES}]+", "-"),
    (r"[`´«»“”¨]", '"'),
    (r"[‘’]", "'"),
    (r"&quot;?", ""),
    (r"&amp", ""),
    (r"\d{1,3}(?:\.\d{1,3}){3}", " "),  # IP address
    (r"\d:\d\d\s+$", ""),  # article number at the end
    (r"\\n", " "),  # a line break written out
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"(?<!\S)\S+\.{_FILE_TYPE}", ""),
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " "),
    (r"(?<!\s)\s+\.\s+", " "),
)
_WORDS_AND_SPACING = (
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # jc6640
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),  # jc6640vc
    (r"\b\d+[a-zA-Z]+\d+\b", ""),  # 6640vc231
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b{_FILE_TYPE}(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d[a-zA-Z\d]*\b", " "),  # j2d1a2a
    (r"\b\d+(?:\.\d*)?[xх×]\d+(?:\.\d*)?\b", ""),  # 1080x1920, with a Latin or a Cyrillic x
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)


def _apply(rules: tuple[tuple[str, str], ...], text: str) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


def _without_addresses(text: str, scheme: re.Pattern[str]) -> str:
    r"""`re.sub` of `\b(?:SCHEME|DOMAIN)` with nothing.

    No part of a name is an address if the whole is none, so that each is looked at once.
    """
    kept, end, tried = [], 0, 0  # `tried`: where the name ends that is known to hold no address
    edge = _WORD_EDGE.search(text)
    while edge is not None and edge.start() < len(text):
        begin = edge.start()
        found = scheme.match(text, begin) or (_ADDRESS.match(text, begin) if begin >= tried else None)
        if found:
            kept.append(text[end:begin])
            end = found.end()
        elif begin >= tried and (name := _NAME.match(text, begin)):
            tried = name.end()
        edge = _WORD_EDGE.search(text, end if found else begin + 1)
    return "".join([*kept, text[end:]])


def _fix_characters(text: str) -> str:
    """`ftfy.fix_text(text)`, which leaves printable ASCII without character references as it is."""
    if text.isascii() and text.isprintable() and "&" not in text:
        return text
    import ftfy

    return ftfy.fix_text(text)


def normalize(text: str) -> str:
    """`text` in lower case without surrounding space: all that is done where cleaning is switched off."""
    return text.lower().strip()


def clean(text: str) -> str:
    """`text` after one pass of the rules; it may come out empty."""
    text = normalize(unquote_plus(text)).replace("<person>", "person")
    for scheme in _SCHEMES:
        text = _without_addresses(text, scheme)
    if "<" in text or "&" in text:
        from bs4 import BeautifulSoup

        text = BeautifulSoup(text, features="html.parser").text
    text = _apply(_CHARACTERS, text)
    if len(re.findall("[-_]", text)) > 3:  # this-is-my-cute-cat
        text = re.sub("[-_]", " ", text)
    text = html.unescape(html.unescape(_fix_characters(text))).strip()
    return _apply(_WORDS_AND_SPACING, text).strip()


def preprocess(text: str) -> str:
    """`text` as T5 is given it: cleaned twice."""
    return clean(clean(text))
