"""The kinds of tasks: one file each, its name is the kind's with `_` for `-`.

Third parties add kinds by an entry point in the group `mergebench.tasks`.
"""

from mergebench.evaluation.task import Kind
from mergebench.plugins import Registry

_registry = Registry(__name__, "mergebench.tasks", "kind of task", Kind, "@task", dashes=True)
names, origin, get = _registry.names, _registry.origin, _registry.get
