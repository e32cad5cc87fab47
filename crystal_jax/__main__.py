"""`python -m crystal_jax COMMAND ...`."""

from crystal_jax.cli import start

start()
