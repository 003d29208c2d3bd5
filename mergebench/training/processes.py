"""Several processes that train one thing, as `accelerate launch` starts them: one of them writes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mergebench.checkpoint.documents import read_json
from mergebench.checkpoint.staging import Staging
from mergebench.checkpoint.target import JOURNAL, partial


def join(device: torch.device) -> torch.device:
    """Find the other processes, before anything else here is asked; the device of this one, of several GPUs its own."""
    from accelerate import PartialState

    state = PartialState(cpu=device.type == "cpu")
    return state.device if device.type == "cuda" and state.num_processes > 1 else device


def is_main() -> bool:
    """Whether this process writes."""
    from accelerate import PartialState

    return bool(PartialState().is_main_process)


def count() -> int:
    """How many processes there are."""
    from accelerate import PartialState

    return int(PartialState().num_processes)


def number() -> int:
    """This process's, from 0."""
    from accelerate import PartialState

    return int(PartialState().process_index)


def wait() -> None:
    """Until all processes are here."""
    from accelerate import PartialState

    PartialState().wait_for_everyone()


@dataclass
class Guest:
    """What another process stages, to be read."""

    directory: Path
    journal: dict[str, Any]

    def save(self) -> None:
        """Nothing."""

    def complete(self, *files: str) -> None:
        """Nothing."""


@contextmanager
def staged(out: Path, fingerprint: str, resume: bool) -> Iterator[Staging | Guest]:
    """The staging directory of `out`: the main process makes it, the others read it."""
    if is_main():
        with Staging(out, fingerprint, resume) as staging:
            wait()
            yield staging
    else:
        wait()
        directory = partial(Path(os.path.realpath(out)))
        yield Guest(directory, read_json(directory / JOURNAL, dict[str, Any]))
