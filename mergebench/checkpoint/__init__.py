"""What is on disk: reading, checking and writing checkpoints."""

from mergebench.checkpoint.adopt import adopt
from mergebench.checkpoint.header import Header, TensorInfo, read_header
from mergebench.checkpoint.model import Model, open_model

__all__ = ["Header", "Model", "TensorInfo", "adopt", "open_model", "read_header"]
