"""The four models of a port on a suite: old, tuned, new, ported."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mergebench.checkpoint import Model
from mergebench.deltas.open import open_model
from mergebench.systems.portllm.checkpoint import plan_port, run_port
from mergebench.systems.portllm.opened import open_port

if TYPE_CHECKING:
    from mergebench.evaluation import Results, Step, Suite

BEFORE, AFTER = "tuned", "ported"  # rows of the table, between old and new


def measure_port(
    old: str,
    new: str,
    patch: str | Path,
    suite: Suite | str | Path,
    *,
    out: str | Path | None = None,
    difference: bool = False,
    exclude: tuple[str, ...] = (),
    split: str | None = None,
    device: str = "auto",
    results: str | Path | None = "results",
    progress: Callable[[Step], None] | None = None,
) -> Results:
    """Measure old, tuned (a fine-tune, or old with the adapter), new and ported, one in memory at a time; compared with
    tuned, which is what its users have now.

    out: the ported model, where it is written already. Else an adapter is put on the new base, and a port that is a
    checkpoint is written to a temporary folder when its turn comes. The other settings are those of `measure`.
    """
    from mergebench.evaluation import Candidate, evaluate_models, load_suite
    from mergebench.evaluation.store import Store

    loaded = (load_suite(suite) if isinstance(suite, (str, Path)) else suite).only(split)
    opened = open_port(old, new, patch, exclude)  # what does not fit fails before anything is measured
    adapter = None if difference else opened.adapter
    with tempfile.TemporaryDirectory(prefix="mergebench-") as folder:

        def ported() -> Model:
            if adapter is not None:
                return open_model(f"{new}+{patch}" if out is None else f"{new}+{_delta(Path(out), adapter)}")
            if out is not None:
                return open_model(str(out))
            run_port(plan_port(old, new, patch, exclude=exclude), place := Path(folder) / "ported")
            return open_model(str(place))

        tuned = f"{old}+{patch}" if opened.adapter is not None else str(patch)
        candidates = [
            Candidate("old", "base", open_model(old)),
            Candidate(BEFORE, "input", found := open_model(tuned), found.own_directory()),
            Candidate("new", "base", open_model(new)),
            Candidate(AFTER, "merged", ported),
        ]
        store = None if results is None else Store(Path(results))
        found_results = evaluate_models(candidates, loaded, device=device, store=store, progress=progress)
    models = {"old": old, BEFORE: tuned, "new": new, AFTER: str(out) if out is not None else f"port of {patch}"}
    return replace(found_results, made={**found_results.made, "baseline": BEFORE, "models": models})


def _delta(out: Path, adapter: Path) -> Path:
    """What follows the plus: the directory, or the file in it."""
    return out / adapter.name if adapter.is_file() else out
