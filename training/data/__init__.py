"""Reads images and embeddings for training."""
