"""Configurations: files read as data, sections with declared types, names of files."""

from opensora.config.names import find_config, load_config
from opensora.config.reader import merge_configs, read_config

__all__ = ["find_config", "load_config", "merge_configs", "read_config"]
