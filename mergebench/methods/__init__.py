"""The merge methods: one file each, the file's name is the recipe's name.

Third parties add methods by an entry point in the group `mergebench.methods`, users by FILE.py:NAME.
"""

from mergebench.engine.method import Method
from mergebench.plugins import Registry, in_file

_registry = Registry(__name__, "mergebench.methods", "method", Method, "@merge_method")
names, origin, get, read, add = _registry.names, _registry.origin, _registry.get, _registry.read, _registry.add

__all__ = ["add", "get", "in_file", "names", "origin", "read"]
