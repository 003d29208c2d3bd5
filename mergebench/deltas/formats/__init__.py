"""Formats of deltas on disk: one file a format.

Third parties add formats by an entry point in the group `mergebench.formats`.
"""

from pathlib import Path

from mergebench.checkpoint.format import Format
from mergebench.deltas.peft.directory import peft_type
from mergebench.plugins import Registry

_registry = Registry(__name__, "mergebench.formats", "format", Format, "@delta_format")
names, origin, get = _registry.names, _registry.origin, _registry.get


def peft_types() -> str:
    """The PEFT types that have a format."""
    return ", ".join(name.upper() for name in names() if get(name).what == "an adapter")


def format_of(place: Path) -> Format | None:
    """The format of a directory or file of deltas; None for anything else."""
    own = (peft_type(place) or "").lower()  # asked first: the others need not be imported
    ordered = sorted(names(), key=lambda name: name != own)
    return next((known for known in map(get, ordered) if known.claims(place)), None)
