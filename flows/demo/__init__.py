"""What only the bundled recipes need: emoji, their names and their captions."""
