"""Configurations: files read as data, sections with declared types, names of files."""

from opensora.config.reader import find_config, merge_configs, read_config

__all__ = ["find_config", "merge_configs", "read_config"]
