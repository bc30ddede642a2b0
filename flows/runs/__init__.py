"""Plans and records of runs, promotion and export."""
