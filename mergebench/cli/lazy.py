"""Commands that only list what is declared do not wait for torch, which the modules of the methods import."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


class _Later(ModuleType):
    """A module that is imported when something of it is used."""

    def __getattr__(self, name: str) -> Any:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        real = importlib.import_module(self.__name__)
        vars(self).update(vars(real))
        return getattr(real, name)


AFTER = 1.0  # seconds until it is said that torch is being imported


def say_loading() -> None:
    """On a terminal: say so where torch is still being imported after a second, until it is."""
    if sys.stderr is not None and sys.stderr.isatty():
        threading.Thread(target=_wait, daemon=True).start()


def _wait() -> None:
    time.sleep(AFTER)
    while isinstance(sys.modules.get("torch"), _Later | None):  # on a slow disk its import has yet to begin
        time.sleep(0.05)
    if not _is_loading():
        return
    os.write(2, b"loading torch\r")
    while _is_loading():
        time.sleep(0.05)
    os.write(2, b"\x1b[K")


def _is_loading() -> bool:
    spec = getattr(sys.modules.get("torch"), "__spec__", None)
    return bool(getattr(spec, "_initializing", False))


@contextmanager
def torch_later() -> Iterator[None]:
    """Inside, `import torch` costs nothing until torch is used; modules imported meanwhile use it as ever."""
    if "torch" in sys.modules:
        yield
        return
    later = _Later("torch")
    later.__spec__ = importlib.util.find_spec("torch")
    sys.modules["torch"] = later
    try:
        yield
    finally:
        if sys.modules.get("torch") is later:
            del sys.modules["torch"]
