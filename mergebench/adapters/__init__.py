"""Adapters: LoRA as low-rank differences, and sequences of adapters of any type by their stored tensors."""

from mergebench.adapters.convert import convert_adapter
from mergebench.adapters.describe import describe_adapter
from mergebench.adapters.drift import adapter_drift
from mergebench.adapters.extract import extract_adapter
from mergebench.adapters.intrinsic_dimension import captured, pack
from mergebench.adapters.merge import merge_adapters
from mergebench.adapters.sequence import merge_sequence
from mergebench.adapters.to_file import convert_to_file
from mergebench.adapters.truncate import truncate_adapter

__all__ = [
    "adapter_drift",
    "captured",
    "convert_adapter",
    "convert_to_file",
    "describe_adapter",
    "extract_adapter",
    "merge_adapters",
    "merge_sequence",
    "pack",
    "truncate_adapter",
]
