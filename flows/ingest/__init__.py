"""Download, shards and the keep list."""
