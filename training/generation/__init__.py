"""What a trained system draws."""
