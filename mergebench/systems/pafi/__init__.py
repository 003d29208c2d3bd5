"""PaFi (arXiv:2305.16742): masks of the weights that a sparse fine-tune may change, and the fine-tune."""

from mergebench.systems.pafi.masks import Made, Shared, make_mask, overlap

__all__ = ["Made", "Shared", "make_mask", "overlap"]
