"""LST (arXiv:2206.06522): a narrow network beside a frozen one, begun as its most important rows and columns."""

from mergebench.systems.lst.init import side_init
from mergebench.systems.lst.ladder import ladder as module
from mergebench.systems.lst.train import ladder

__all__ = ["ladder", "module", "side_init"]
