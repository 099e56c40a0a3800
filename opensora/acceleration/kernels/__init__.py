"""Exact replacements for slow operations of a CPU."""
