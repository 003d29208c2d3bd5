"""The head alone: the base stays as it is, a control for everything that changes it."""

from pathlib import Path

from mergebench.training.attached import Attached, Base
from mergebench.training.declared import Nothing, trained


class _Head(Attached):
    def save(self, directory: Path) -> None:
        """Nothing: the task saves its head."""

    def load(self, directory: Path) -> None:
        """Nothing: the task reads its head."""

    def reference(self, base: str, directory: Path) -> str:
        """The base."""
        return base


@trained(paper="arXiv:1610.01644")
def head(base: Base, p: Nothing) -> Attached:
    """Only the task's head is trained."""
    return _Head({})
