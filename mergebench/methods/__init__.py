"""The merge methods: one file each, the file's name is the recipe's name.

Third parties add methods by an entry point in the group `mergebench.methods`.
"""

from mergebench.engine.method import Method
from mergebench.plugins import Registry

_registry = Registry(__name__, "mergebench.methods", "method", Method, "@merge_method")
names, origin, get = _registry.names, _registry.origin, _registry.get
