"""Reads embeddings, images and labelled sets."""
