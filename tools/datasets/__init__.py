"""Programs on tables."""
