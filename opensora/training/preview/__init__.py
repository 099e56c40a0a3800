"""What a training step is given, for people: clips as frames, with their masks and captions."""
