"""Crystal: pretraining of language-and-code models in phases, with JAX."""

__version__ = "0.1.0"
