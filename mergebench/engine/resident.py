"""What runs in a worker's process on a machine of a cluster."""

from __future__ import annotations

import gc
import os
import pickle
import platform
import sys
from typing import Any

from mergebench.engine.cluster import SHARE, versions
from mergebench.engine.machine import keep_freed_memory
from mergebench.errors import RunError, in_words, sendable


class Resident:
    """In a worker's process: the object that is asked, of one pool at a time."""

    def __init__(self) -> None:
        self._object, self._number = None, 0

    def versions(self) -> dict[str, str]:
        return versions()

    def ask(self, number: int, make: list[Any], name: str, *arguments: Any) -> tuple[bool, Any]:
        """Whether it worked, and what the method returned or raised; of a new pool, `make` makes the object first."""
        try:
            if number != self._number:
                self._begin(*make)
                self._number = number
            return True, getattr(self._object, name)(*arguments)
        except Exception as error:
            return False, sendable(error)

    def _begin(self, make: Any, folder: str, path: list[str]) -> None:
        import ray

        self._object, self._number = None, 0
        gc.collect()
        gc.freeze()  # what lives now stays: to look through torch and Ray takes a tenth of a second each time
        sys.path[:] = [*sys.path, *(one for one in path if one not in sys.path)]
        try:
            os.chdir(folder)
        except OSError as error:
            what = f"{folder}: {platform.node()} cannot enter it: {error.strerror}"
            hint = "run in a folder that all machines of the cluster share, under the same path"
            raise RunError(what, hint) from None
        keep_freed_memory()
        sent = ray.get(make)
        try:
            made = pickle.loads(sent)
        except Exception as error:  # a file or a module that it names is not here
            raise RunError(f"{platform.node()}: {in_words(error)}", SHARE) from None
        self._object = made()
