"""Floor 2: models, diffusion, losses, training loop, Ray Train jobs, sampling and generation."""
