"""FAISS: choosing, building, tuning and searching an index."""
