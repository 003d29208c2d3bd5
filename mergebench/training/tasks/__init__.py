"""Kinds of training tasks: one file a kind; third parties add kinds by an entry point, `mergebench.training_tasks`."""

from mergebench.plugins import Registry
from mergebench.training.task import Kind

_registry = Registry(
    __name__, "mergebench.training_tasks", "kind of training task", Kind, "@training_task", dashes=True
)
names, origin, get = _registry.names, _registry.origin, _registry.get
