"""Runs stages on items: worker processes that may die, a ledger that remembers every result."""
