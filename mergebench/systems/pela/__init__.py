"""PELA's low-rank models without its training (arXiv:2310.10700): linear layers as products of two, and back."""

from mergebench.systems.pela.factor import compress
from mergebench.systems.pela.multiply import expand

__all__ = ["compress", "expand"]
