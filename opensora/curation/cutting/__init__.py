"""Clips of a table written as files of their own."""
