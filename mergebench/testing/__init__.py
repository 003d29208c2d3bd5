"""Proof that what is added keeps the rules: `check_method` in a plugin's tests; `mergebench doctor` runs the checks."""

from mergebench.testing.methods import check_method

__all__ = ["check_method"]
