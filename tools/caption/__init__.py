"""Programs that caption clips."""
