"""Pure functions that compute the figures of the report."""
