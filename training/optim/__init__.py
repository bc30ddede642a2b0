"""The training loop, optimisers and collective operations."""
