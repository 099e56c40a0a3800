"""What a table holds: counts, distributions, examples; as text, pictures and a page."""
