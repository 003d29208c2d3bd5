"""LoRA adapters as what they are: low-rank differences, merged in delta space, or taken out of a fine-tune."""

from mergebench.adapters.extract import extract_adapter
from mergebench.adapters.merge import merge_adapters

__all__ = ["extract_adapter", "merge_adapters"]
