"""Moving shapes with captions: rendered, batched, and recognized in generated frames."""
