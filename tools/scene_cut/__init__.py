"""Programs that find and cut scenes."""
