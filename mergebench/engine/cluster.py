"""The machines of a cluster, by Ray (https://docs.ray.io): joined quietly, and their workers counted.

Ray starts processes on them, carries pickled calls there, and says when one is gone. The machines share their storage.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import secrets
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from mergebench.checkpoint.files import write_error
from mergebench.engine.machine import cores
from mergebench.errors import RecipeError, RunError, in_words
from mergebench.plugins import need

HERE = "ray"
PATIENCE = 15.0  # seconds in which a cluster may begin to listen
STORE = 200_000_000  # bytes of shared memory for what is sent, in a cluster that is started here
SHARE = "the machines of a cluster must share the storage of inputs and outputs, under the same paths"
LIBRARIES = ("torch", "transformers", "numpy")  # whose versions decide about bits


class Machine(NamedTuple):
    """A machine of a cluster, and how many workers of a run it gets."""

    node: str  # its id
    name: str  # its address
    cpus: int
    gpus: int
    workers: int = 0


Cluster = tuple[Machine, ...]


def join(on: str, workers: int | None = None, *, models: bool = False) -> Cluster:
    """The machines of the cluster that `--on` names, with `workers` spread over them.

    on: `ray` (the cluster of RAY_ADDRESS; without it, one of this machine alone), or `ray://HOST:PORT`. workers: None
    for one per core, or, where each holds a model (`models`), one per GPU, and one on a machine without. Raises
    `RecipeError` if there are fewer cores, or Ray is not installed; `RunError` if no cluster answers.
    """
    if on != HERE and not re.fullmatch(r"ray://.+:\d+", on):
        raise RecipeError(f"--on {on}: not an executor", "write ray, or ray://HOST:PORT")
    need("ray", "clusters")
    ray = _joined(on, workers)
    machines = [
        Machine(one["NodeID"], one["NodeManagerAddress"], int(of.get("CPU", 0)), int(of.get("GPU", 0)))
        for one in sorted(ray.nodes(), key=lambda one: str(one["NodeID"]))
        if one["Alive"] and (of := one["Resources"]).get("CPU", 0) >= 1
    ]
    if not machines:
        raise RunError(f"--on {on}: the cluster has no cores", "start its machines: ray start --address=HEAD:6379")
    return _spread(machines, workers, models)


def _joined(on: str, workers: int | None) -> Any:
    """Ray, connected."""
    address = (os.environ.get("RAY_ADDRESS") or None) if on == HERE else on
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # else a call after the cluster is lost starts another, here
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    token = {}
    if address is None and "RAY_AUTH_MODE" not in os.environ and "ray" not in sys.modules:
        # only this user may give it work; Ray alone would write a token to the home, which may not be written
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        os.environ |= token
    import ray

    if ray.is_initialized():
        return ray
    where: dict[str, Any] = {"address": address}
    if address is None:
        where = {"address": "local", "include_dashboard": False, "object_store_memory": STORE}
        where |= {"num_cpus": max(cores(), workers or 0)}
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        _await(address)
        with _silenced():
            ray.init(**where, log_to_driver=False, logging_level=logging.CRITICAL)
    except SystemExit:  # how Ray's own handler answers SIGTERM
        signal.signal(signal.SIGTERM, before[signal.SIGTERM])
        signal.raise_signal(signal.SIGTERM)
        raise
    except Exception as error:  # of many sorts, by the way it is joined
        where_else = "" if address == on else f" at {address}"
        what = "Ray does not start" if address is None else f"no cluster answers{where_else}"
        hint = "ray status says what runs; a cluster that asks for a token answers where RAY_AUTH_MODE=token is set"
        raise RunError(f"--on {on}: {what}: {in_words(error)}", hint) from None
    finally:
        for number, handler in before.items():  # Ray puts its own in their place
            signal.signal(number, handler)
        for name in token:
            del os.environ[name]
    # what Ray prints of workers that died goes to stdout, whatever it is asked for; here the pool says it
    worker: Any = sys.modules["ray._private.worker"]
    if hasattr(worker, "print_to_stdstream"):
        worker.print_to_stdstream = lambda data, ignore_prefix: None
    return ray


def _await(address: str | None) -> None:
    """`OSError` if nothing listens at HOST:PORT for a while: Ray would try for ten minutes, and heed no Ctrl-C."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        return
    end = time.monotonic() + PATIENCE
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
        time.sleep(0.5)


@contextmanager
def _silenced() -> Iterator[None]:
    """Nothing is printed on stderr: Ray's core writes a line a second there, past Python, while it finds no cluster."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)


def joined() -> bool:
    """Whether this process has Ray's threads, which a fork would leave behind."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def assigned_cores() -> int:
    """The cores that the cluster gave the worker whose process this is; elsewhere, all of the machine."""
    if not joined():
        return cores()
    given = sys.modules["ray"].get_runtime_context().get_assigned_resources()
    return max(int(given.get("CPU", 0)), 1) if given else cores()


def leave() -> None:
    """Leave the cluster, and end one that was started for this process."""
    if joined():
        sys.modules["ray"].shutdown()


def _spread(machines: Sequence[Machine], workers: int | None, models: bool) -> Cluster:
    """Each worker to the machine that has the most room for it."""
    room = [(one.gpus or 1) if models else one.cpus for one in machines]
    every = sum(one.cpus for one in machines)
    if workers is not None and workers > every:
        raise RecipeError(f"--workers {workers}: the cluster has {every} cores", "ask for at most that many")
    given = Counter[int]()
    for _ in range(sum(room) if workers is None else workers):
        free = [number for number, one in enumerate(machines) if given[number] < one.cpus]
        given[min(free, key=lambda number: (given[number] / room[number], number))] += 1
    return tuple(one._replace(workers=given[number]) for number, one in enumerate(machines) if given[number])


def versions() -> dict[str, str]:
    """What must be equal on all machines for results to be."""
    from mergebench import __version__

    own = {"mergebench": __version__, "Python": platform.python_version()}
    return own | {name: version(name) for name in LIBRARIES}


class Marker(NamedTuple):
    """A file that only machines which share its folder see, and only while a run is at work there."""

    file: Path

    def check(self) -> None:
        """`RunError` if this machine does not see it."""
        if not self.file.exists():
            what = f"{self.file.parent}: {platform.node()} has another folder there, or a later run has taken it over"
            raise RunError(what, SHARE)


@contextmanager
def marked(folder: Path) -> Iterator[Marker]:
    """The folder, made if it is not there, has a marker inside the context."""
    marker = Marker(folder / f".shared-{secrets.token_hex(8)}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        marker.file.touch()
    except OSError as error:
        raise write_error(marker.file, error) from None
    try:
        yield marker
    finally:
        marker.file.unlink(missing_ok=True)
