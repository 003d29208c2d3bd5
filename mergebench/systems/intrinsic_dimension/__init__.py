"""Intrinsic dimension (Aghajanyan et al., arXiv:2012.13255): a model trained in a random subspace, and the smallest one
that is enough."""

from mergebench.systems.intrinsic_dimension.kind import subspace

__all__ = ["subspace"]
