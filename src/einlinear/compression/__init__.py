"""Trained models made smaller: what layers read, what each structure would lose, who gets how much of the budget.

`allocation` needs no torch, and `einlinear` imports it at once: nothing is imported here.
"""
