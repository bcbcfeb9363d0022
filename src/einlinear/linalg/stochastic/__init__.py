"""Estimates from random probes: traces, determinants, diagonals, truncated factorisations, unbiased solves."""
