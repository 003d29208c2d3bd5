"""Kinds of adapter that `adapters extract` can write: one file a kind, the file's name is what `--as` takes.

Third parties add kinds by an entry point in the group `mergebench.targets`.
"""

from mergebench.adapters.target import Target
from mergebench.plugins import Registry

_registry = Registry(__name__, "mergebench.targets", "kind of adapter to extract", Target, "Target(...)")
names, origin, get = _registry.names, _registry.origin, _registry.get
