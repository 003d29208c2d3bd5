"""PortLLM (arXiv:2410.10870): carry a fine-tune or an adapter from the base it was made on to an updated base.

    new' = new + (tuned - old)

The paper stores the patch, tuned - old, as a LoRA's product scale B A; here it may be any fine-tune or adapter. The
paper's lemma is about the rank of what a port loses, which says nothing about its size: measure.
"""

from mergebench.systems.portllm.adapter import port_adapter
from mergebench.systems.portllm.check import check_port
from mergebench.systems.portllm.checkpoint import plan_port, port
from mergebench.systems.portllm.measured import measure_port

__all__ = ["check_port", "measure_port", "plan_port", "port", "port_adapter"]
