"""Modules: what runs beside a network and is no change to its weights, read from a file after a plus.

    @network_module
    def ladder(network: Network, file: Path) -> None:
        ...

The file's metadata name the kind. A kind changes what the network's backbone returns; systems declare theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergebench.checkpoint.header import read_header
from mergebench.plugins import Scanned


@dataclass(frozen=True)
class Module:
    """A kind of module, and the function that puts one on a network."""

    name: str
    function: Callable[[Any, Path], None]


def network_module(function: Callable[[Any, Path], None]) -> Module:
    """Declare a function `(network, file) -> None` as a kind of module."""
    return Module(function.__name__, function)


modules = Scanned(("mergebench.systems",), "mergebench.modules", "module of a network", Module, "@network_module")


def put_beside(network: Any, file: Path) -> None:
    """Put the module of a file on a network; `ModelError` if it does not fit, `RecipeError` if its kind is unknown."""
    modules.get(read_header(file).metadata.get("module", "")).function(network, file)
