"""Fit a probe: features of labelled texts, a layer, a classifier, and its test scores."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mergebench.checkpoint.content import identity, may_keep, sha256_of, tokenizer_hash
from mergebench.checkpoint.files import write_error
from mergebench.checkpoint.target import check_file
from mergebench.deltas.open import open_model
from mergebench.editing.probes import classifier
from mergebench.editing.probes.classifier import Array, Validated
from mergebench.editing.probes.curve import write_curve
from mergebench.editing.probes.feature_cache import Features, Keeper
from mergebench.editing.probes.labels import Labelled, read_labelled
from mergebench.editing.probes.layers import Reading
from mergebench.editing.probes.probe import Probe
from mergebench.editing.probes.settings import Settings
from mergebench.errors import RecipeError, RunError, out_of_memory
from mergebench.networks.device import device_of, versions
from mergebench.networks.loadable import ticking
from mergebench.parameters import parameters_of
from mergebench.plugins import need

TEST_SHARE = 0.2
LEAST = 10  # texts of a class, including test texts

Progress = Callable[[str, int, int], None]  # called with the current task, items done, and total


def fit_probe(
    model: str,
    data: str | Path,
    out: str | Path,
    *,
    device: str = "auto",
    results: str | Path | None = "results",
    overwrite: bool = False,
    progress: Progress = lambda what, done, total: None,
    **how: Any,
) -> Probe:
    """Fit a linear probe of a behaviour and write it to the file `out`.

    model: as a recipe names it. data: JSON lines of texts with labels. how: the fields of `Settings`. layer counts as
    transformers' `hidden_states`, from the end if negative; "all" takes the layer of the best cross-validated accuracy,
    the first of equals, and plots all layers beside the probe. Without `test` a fifth of the data, drawn by `seed`, is
    for testing. results: the folder that keeps features, so that the model runs once; None: none.

    `RecipeError` for an invalid setting or an existing target, `RunError` for data that do not fit.
    """
    settings = _settings(how)
    sklearn = need("scikit-learn", "probes")
    layer, test = settings.layer, settings.test
    number = -1 if isinstance(layer, str) else layer
    reading = Reading(number, settings.norm, settings.pool, settings.max_length)
    target = Path(out)
    _check_target(target, layer == "all", overwrite)
    learnt = read_labelled(Path(data), settings.text, settings.label, settings.undesired)
    _check_classes(Path(data), learnt)
    tested = None
    if test is not None:
        tested = read_labelled(Path(test), settings.text, settings.label, settings.undesired)
    known, asked = _split(learnt, settings.seed) if tested is None else _apart(learnt, tested)
    texts = learnt.texts + (tested.texts if tested else [])
    every = np.array(learnt.undesired + (tested.undesired if tested else []))
    opened = open_model(model)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(target, error) from None
    kept = None if results is None or not may_keep(Path(results)) else str(results)
    with tempfile.TemporaryDirectory(prefix="mergebench-") if kept is None else nullcontext(kept) as folder:
        keeper = Keeper(opened, reading, device_of(device), Path(folder))
        features = _features(keeper, texts, progress)
        depth = features.depth
        wanted = range(depth + 1) if layer == "all" else [reading.layer % (depth + 1)]
        states = {number: replace(reading, layer=number).state(depth) for number in wanted}
        found: dict[int, Validated] = {}
        for number, state in states.items():
            found[number] = classifier.validate(features.rows(state)[known], every[known], settings.seed)
            progress("fitting", len(found), len(states))
        best = max(found, key=lambda number: (found[number].accuracy, -number))
        rows = features.rows(states[best])
        x, y, x_test, y_test = rows[known], every[known], rows[asked], every[asked]
    fitted = classifier.fit(x, y, found[best].strength)
    if not fitted.weight.astype(np.float32).any():
        raise RunError(f"model '{opened.reference}': all texts have the same features", "choose another --layer")
    about: dict[str, Any] = {
        "layer": best,
        "depth": depth,
        "norm": settings.norm,
        "pool": settings.pool,
        "max_length": settings.max_length,
        "classes": list(learnt.classes),
        "model": {"reference": opened.reference, "identity": identity(opened)},
        "tokenizer": tokenizer_hash(opened.side_directory),
        "data": {str(file): sha256_of(Path(file)) for file in (data, test) if file is not None},
        "seed": settings.seed,
        "n_train": len(y),
        "n_test": len(y_test),
        "train_accuracy": classifier.right(fitted.logits(x), y),
        "test_accuracy": classifier.right(fitted.logits(x_test), y_test),
        "majority": _majority(y_test),
        "auc": classifier.area(fitted.logits(x_test), y_test),
        "cv_accuracy": found[best].accuracy,
        "cv_stderr": found[best].stderr,
        "cv_majority": _majority(y),
        "C": found[best].strength,
        "versions": {**versions(), "scikit-learn": sklearn},
        "notes": [] if keeper.remark is None else [f"{opened.reference}: {keeper.remark}"],
    }
    if layer == "all":
        about["layers"] = [
            {"layer": number, "cv_accuracy": one.accuracy, "cv_stderr": one.stderr, "auc": one.auc, "C": one.strength}
            for number, one in found.items()
        ]
    probe = _probe(fitted, x, y, about).save(target)
    if layer == "all":
        write_curve(about, plot_of(target))
    return probe


def plot_of(probe: Path) -> Path:
    """The path of the plot of a probe's layers."""
    return probe.with_suffix(".png")


def _probe(fitted: classifier.Classifier, x: Array, undesired: Array, about: dict[str, Any]) -> Probe:
    """A probe with the rows -w/2 and w/2, so that the difference of the two logits is the classifier's logit."""
    half = torch.from_numpy(fitted.weight / 2).float()
    bias = torch.tensor([-fitted.bias / 2, fitted.bias / 2])
    means = [x[side].mean(0, dtype=np.float64) for side in (undesired, ~undesired)]
    return Probe(torch.stack([-half, half]), bias, torch.from_numpy(means[0] - means[1]).float(), about)


def _settings(how: Mapping[str, Any]) -> Settings:
    """The checked settings; None counts as not given."""
    parameters = parameters_of(Settings)
    given = {name: value for name, value in how.items() if value is not None}
    for name in given.keys() & parameters.keys():  # unknown names raise Python's own error
        complaint = parameters[name].complaint(given[name])
        if complaint is not None:
            what = f"--{name.replace('_', '-')}: {complaint}, got {given[name]!r}"
            raise RecipeError(what, parameters[name].help)
    return Settings(**given)


def _check_target(out: Path, curve: bool, overwrite: bool) -> None:
    check_file(out, [], overwrite, "a probe", "a probe is a file: NAME.safetensors")
    if curve and (plot := plot_of(out)).exists() and (plot.is_dir() or not overwrite):
        raise RecipeError(f"{plot}: it exists", "replace it with --overwrite, or choose another --out")


def _check_classes(file: Path, data: Labelled) -> None:
    for name, side in zip(data.classes, (False, True), strict=True):
        count = data.undesired.count(side)
        if count < LEAST:
            what = f"{file}: {count} text{'s' * (count > 1)} of class '{name}'"
            raise RunError(what, f"a probe needs at least {LEAST} of each class")


def _split(data: Labelled, seed: int) -> tuple[Array, Array]:
    """Positions for training and for testing, each ascending, stratified by class."""
    from sklearn.model_selection import train_test_split

    places = np.arange(len(data.texts))
    known, asked = train_test_split(places, test_size=TEST_SHARE, stratify=data.undesired, random_state=seed)
    return np.sort(known), np.sort(asked)


def _apart(learnt: Labelled, tested: Labelled) -> tuple[Array, Array]:
    """Positions of the texts of two files; the test texts follow the training texts."""
    for text, where in tested.places.items():
        if text in learnt.places:
            raise RunError(
                f"{where}: the same text is in {learnt.places[text]}", "what is learnt from is not tested on"
            )
    both = np.arange(len(learnt.texts) + len(tested.texts))
    return both[: len(learnt.texts)], both[len(learnt.texts) :]


def _features(keeper: Keeper, texts: list[str], progress: Progress) -> Features:
    try:
        return keeper.features(texts, ticking(partial(progress, "reading texts"), len(texts)))
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        what = f"model '{keeper.model.reference}': out of memory"
        raise RunError(what, "run it on a machine, or a --device, with more memory") from None


def _majority(undesired: Array) -> float:
    share = float(np.mean(undesired))
    return max(share, 1 - share)
