"""Runs the stages in order, on this machine or on a Ray cluster."""
