"""Triton kernels on a machine without a GPU: its interpreter runs them, in float32, on small sizes."""

import os

# Read when a kernel is defined, which einlinear puts off until one is launched.
os.environ["TRITON_INTERPRET"] = "1"
