"""Prefect's servers and deployments."""
