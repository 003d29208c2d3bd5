"""The scorers of written continuations: one file each, its name is the scorer's with `_` for `-`.

Third parties add scorers by an entry point in the group `mergebench.scorers`.
"""

from mergebench.evaluation.scorer import ScorerKind
from mergebench.plugins import Registry

_registry = Registry(__name__, "mergebench.scorers", "scorer", ScorerKind, "@scorer", dashes=True)
names, origin, get = _registry.names, _registry.origin, _registry.get
