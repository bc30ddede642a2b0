"""Sections of the report that need trained models and indexing together."""
