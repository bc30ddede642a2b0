"""Floor 2: models, diffusion, losses, the training loop, Ray Train jobs, sampling and
generation.
"""
