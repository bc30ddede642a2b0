"""Recipe files and the config that they resolve to."""
