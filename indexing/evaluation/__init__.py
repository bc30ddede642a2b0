"""Measures a run, one file for each section of the report."""
