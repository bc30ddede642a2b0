"""The networks and their file formats."""
