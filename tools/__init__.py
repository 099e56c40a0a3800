"""Open-Sora's programs for data by their names: each runs the command of `opensora data` that does the same."""
