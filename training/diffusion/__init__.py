"""The diffusion process and its samplers, independent of networks."""
