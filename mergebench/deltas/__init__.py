"""Changes to a base: one file a kind, the file's name is the kind's name in files, tables and errors.

Third parties add kinds by an entry point in the group `mergebench.deltas`.
"""

from mergebench.checkpoint.kind import DeltaKind
from mergebench.plugins import Registry

_registry = Registry(
    __name__, "mergebench.deltas", "delta kind", DeltaKind, "@delta_kind", beside=("open", "svd", "verbs")
)
names, origin, get = _registry.names, _registry.origin, _registry.get
