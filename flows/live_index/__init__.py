"""What changes an index after it is built: additions, merges, take-downs."""
