"""Swaps the linear layers of a model for structured ones, chosen by name."""
