"""What is on disk: reading, checking and writing checkpoints."""

from mergebench.checkpoint.adopt import adopt
from mergebench.checkpoint.header import Header, TensorInfo, read_header
from mergebench.checkpoint.model import Model

__all__ = ["Header", "Model", "TensorInfo", "adopt", "read_header"]
