"""Programs that score clips."""
