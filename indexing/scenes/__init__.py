"""Drawn tasks and the exact checkers that judge them."""
