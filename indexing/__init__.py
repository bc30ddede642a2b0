"""Floor 2: the FAISS index, search, deduplication, zero-shot and other reports."""
