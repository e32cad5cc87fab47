"""The forms that an export can have, each with the function that makes it of a checkpoint."""

from functools import partial

from crystal_jax.convert import gguf_file, stablelm
from crystal_jax.convert.forms import FORMS
from crystal_jax.convert.made import Make, moved

MAKERS: dict[str, Make] = {
    **{name: partial(moved, form) for name, form in FORMS.items()}, "stablelm": stablelm.make, "gguf": gguf_file.make}
