"""Ray jobs that train and embed."""
