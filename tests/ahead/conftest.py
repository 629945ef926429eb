"""Compilers for accelerators that are not there, told to use none; set before JAX is imported."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
