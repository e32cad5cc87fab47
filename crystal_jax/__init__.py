"""Crystal: pretraining of language-and-code models in phases, with JAX."""

import os

# Otherwise epath reads gs:// with TensorFlow's client wherever TensorFlow is installed.
os.environ.setdefault("EPATH_USE_TF", "false")

__version__ = "0.1.0"
