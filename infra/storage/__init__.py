"""Files on any store, and the commits that make them exist."""
