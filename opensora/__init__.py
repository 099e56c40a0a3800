"""Open-Sora rebuilt on plain PyTorch: text, image or video in, video out. See docs/python.md.

>>> import opensora
>>> pipe = opensora.load("embedded")
>>> video = pipe("a red circle moving right on a black background", num_frames=17, seed=3)
>>> video.save("out.mp4")
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.2.0"

# Name -> module, imported when the name is used: `import opensora` loads nothing heavy. Types are in __init__.pyi.
_LAZY = {
    "VideoPipeline": "opensora.pipeline.pipeline",
    "Preview": "opensora.pipeline.pipeline",
    "Video": "opensora.pipeline.video",
    "train": "opensora.training",
}
__all__ = ["__version__", "load", *_LAZY]


def __getattr__(name: str) -> Any:
    if name == "load":
        return __getattr__("VideoPipeline").from_pretrained
    if name not in _LAZY:
        raise AttributeError(f"module 'opensora' has no attribute '{name}'")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return __all__
