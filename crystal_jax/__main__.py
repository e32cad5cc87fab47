"""`python -m crystal_jax COMMAND ...`."""

import sys

from crystal_jax.cli import main

sys.exit(main())
