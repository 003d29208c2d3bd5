"""LoRA adapters as what they are: low-rank differences, merged without the model they belong to."""

from mergebench.adapters.merge import merge_adapters

__all__ = ["merge_adapters"]
