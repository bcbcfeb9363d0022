"""`python -m einlinear` is the `einlinear` command."""

from einlinear.cli import main

main()
