"""The edits: one file each, the file's name is the recipe's name.

Third parties add edits by an entry point in the group `mergebench.edits`.
"""

from mergebench.editing.edit import Edit
from mergebench.plugins import Registry

_registry = Registry(__name__, "mergebench.edits", "edit", Edit, "@edit")
names, origin, get = _registry.names, _registry.origin, _registry.get
