"""Finds copies by bytes, by look and by embedding."""
