"""Checkpoints in and out: read, check, fit to a model, summarise, write. With `hub` alone it opens weight files."""

from opensora.weights.fit import check_finite, fit, kept_in_float32, load_weights
from opensora.weights.read import read_metadata, read_state_dict
from opensora.weights.save import save_file, save_pretrained
from opensora.weights.summary import Summary, content_hash, count_parameters, family, inspect, summarize

__all__ = [
    "Summary", "check_finite", "content_hash", "count_parameters", "family", "fit", "inspect", "kept_in_float32",
    "load_weights", "read_metadata", "read_state_dict", "save_file", "save_pretrained", "summarize",
]  # fmt: skip
