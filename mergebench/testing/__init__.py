"""Proof that what is added keeps the rules: `check_method` and `check_delta` in a plugin's tests, and `doctor`."""

from mergebench.testing.deltas import check_delta
from mergebench.testing.methods import check_method

__all__ = ["check_delta", "check_method"]
