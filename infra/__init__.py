"""Floor 1: storage, manifests, table schemas, settings, progress and the Ray cluster."""
