"""Checks that plug-ins keep the rules: `check_method`, `check_delta` and `check_edit`, and `doctor` for all of them."""

from mergebench.testing.deltas import check_delta
from mergebench.testing.edits import check_edit
from mergebench.testing.methods import check_method

__all__ = ["check_delta", "check_edit", "check_method"]
