"""Data sets of other layouts as tables, and tables as WebDataset tars."""
