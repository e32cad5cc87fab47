"""Conversion between the parameters of crystal_jax and PyTorch folders; it stands on the config alone."""
