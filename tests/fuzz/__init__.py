"""Fuzzing: what strangers send ends in a documented outcome, within bounds of memory and time."""
