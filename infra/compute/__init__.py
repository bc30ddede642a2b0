"""Ray, and the memory of this process."""
