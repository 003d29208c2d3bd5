"""The task's own loss: cross-entropy of the rows."""

from torch import Tensor
from torch.nn.functional import cross_entropy

from mergebench.training.declared import Nothing, objective
from mergebench.training.objective import Asked, Loss, Setup


class TaskLoss(Loss):
    """The mean over the rows."""

    def __call__(self, asked: Asked) -> Tensor:
        """Cross-entropy of the batch."""
        return cross_entropy(asked.rows.logits, asked.rows.targets)


@objective(paper="arXiv:1810.04805")
def task(setup: Setup, p: Nothing) -> Loss:
    """Cross-entropy with the task's labels or completions."""
    return TaskLoss()
