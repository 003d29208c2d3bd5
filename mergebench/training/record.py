"""What is known of a training as a whole: what it depends on, the room that it needs, what is written of it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from typing import Any

from mergebench import __version__
from mergebench.checkpoint.content import identity, sha256_of
from mergebench.checkpoint.model import Model
from mergebench.checkpoint.staging import Staging
from mergebench.training.config import Config

RUNS = ".training"  # checkpoints of a run that is not done


def provenance_of(config: Config, models: Mapping[str, Model], staging: Staging) -> dict[str, Any]:
    """What is written of all runs when they are done; their checkpoints go."""
    shutil.rmtree(staging.directory / RUNS, ignore_errors=True)
    runs = staging.journal["answers"].values()
    return {
        "mergebench": __version__,
        "config": dict(config.data),
        "identities": {name: identity(model) for name, model in models.items()},
        "runs": [run for run in runs if not run.get("discarded")],
        "tried": [run for run in runs if run.get("discarded")],
    }


def fingerprint_of(config: Config, models: Mapping[str, Model]) -> str:
    """What the result depends on."""
    files = sorted({file for row in config.rows for file in row.task.files})
    made_of = [
        dict(config.data),
        list(config.seeds),
        {name: identity(model) for name, model in models.items()},
        {str(file): sha256_of(file) for file in files},
        __version__,
    ]
    return hashlib.sha256(json.dumps(made_of, sort_keys=True, default=str).encode()).hexdigest()


def at_most(config: Config, models: Mapping[str, Model]) -> int:
    """Bytes on disk at the end, and of one run's checkpoints: of full fine-tunes, in float32 with AdamW's moments."""
    full = [
        4 * sum(info.numel for info in models[row.model].tensors.values()) for row in config.rows if row.label == "full"
    ]
    return len(config.seeds) * sum(full) + 6 * max(full, default=0) + (50 << 20)
