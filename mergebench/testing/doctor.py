"""Check the identities of merging on the installed methods: `mergebench doctor`.

Small checkpoints of two stored types are merged by the engine. Parameters are chosen by name and range, so methods of
other packages are checked like built-in methods. If an identity does not hold by a method's definition, the method
declares it: `merge_method(exempt=...)`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import cast

import torch

from mergebench import methods
from mergebench.engine.machine import one_thread
from mergebench.engine.method import Identity, Method
from mergebench.engine.noise import TILE
from mergebench.testing.checks import OK, Broken, Finding, Inapplicable, Report, find, words
from mergebench.testing.methods import Tensors, check_cuts, variants
from mergebench.testing.trial import GRID, Trial, check_finite, make_base, moved

CUT = {"matrix": (2, TILE + 465), "bias": (300,), "scale": ()}
# parameters, by name, at which nothing is dropped, and at which half is dropped
KEEP_ALL: dict[str, float] = {"density": 1, "select_topk": 1, "gamma": 0, "epsilon": 0, "clip": 0, "tall_lambda": 0}
KEEP_HALF: dict[str, float] = {"density": 0.5}
ROUNDINGS = 4  # float32 units by which the order of summation may change a sum of three


Progress = Callable[[str, str, int, int], None]


def examine(names: Sequence[str] = (), progress: Progress = lambda method, check, done, total: None) -> list[Report]:
    """Run all checks on the named methods (default: all installed methods).

    progress: called with the method, the check, the number of finished checks, and the total.
    """
    known = set(methods.names())
    names = list(dict.fromkeys(names)) or methods.names()
    for name in names:
        if name not in known:
            methods.get(name)  # raises, with a suggestion
    reports, total = [], len(names) * len(CHECKS)
    for number, name in enumerate(names):
        findings = []
        try:
            steps = diagnose(methods.get(name))
        except Exception as error:  # another package's code may raise anything when it is imported
            steps = iter([Finding(check, "does not load", words(error)) for check in CHECKS])
        for done, check in enumerate(CHECKS):
            progress(name, check, number * len(CHECKS) + done, total)
            findings.append(next(steps))
        reports.append(Report(name, methods.origin(name), tuple(findings)))
    return reports


def diagnose(method: Method) -> Iterator[Finding]:
    """The findings about a method, check by check."""
    for check in CHECKS:
        with one_thread(), tempfile.TemporaryDirectory(prefix="mergebench-") as folder:  # tensors too small for more
            finding = _find(check, [Trial(variant, Path(folder) / variant.takes) for variant in variants(method)])
        yield finding


def _find(check: str, trials: Sequence[Trial]) -> Finding:
    """Run one check on the method, and again without a base if the base is optional."""
    findings = [find(check, partial(_run, check, trial)) for trial in trials]
    return next((finding for finding in findings if finding.failed), min(findings, key=lambda one: one.mark != OK))


def _run(check: str, trial: Trial) -> None:
    if check in trial.method.exempt:
        raise Inapplicable(trial.method.exempt[cast(Identity, check)])
    CHECKS[check](trial)


def _compare(got: Tensors, want: Tensors, base: Tensors, units: int, what: str) -> None:
    """Compare: same bytes (0 units), or within `units` of float32, or one unit of a narrower type.

    A unit is that of the larger of model and base, because their difference is rounded before it is added back.
    """
    for name, value in want.items():
        check_finite(name, got[name])
        eps = torch.finfo(value.dtype).eps
        narrow = value.dtype != torch.float32
        allowed = torch.maximum(value.abs(), base[name].abs()).double() * eps * (min(units, 1) if narrow else units)
        distance = (got[name].double() - value.double()).abs()
        if (distance > allowed).any():
            most = distance.max().item()
            limit = "the same bytes are wanted" if not units else f"{allowed.max().item():.1e} is rounding"
            raise Broken(f"off by {most:.1e}", f"{name}: {what} differ by {most:.1e}, {limit}")


def _one_model(trial: Trial) -> None:
    """One model at weight 1 gives that model."""
    if trial.count(1) != 1:
        raise Inapplicable(f"it takes exactly {trial.method.models} models")
    base = make_base()
    model = moved(base, 1)
    units = 0 if trial.method.takes == "weights" else 1
    _compare(trial.merge(base, [model], trial.params(1, KEEP_ALL, [1.0])), model, base, units, "result and model")


def _equal_models(trial: Trial) -> None:
    """Two and three equal models with weights that add up to one give that model."""
    base = make_base()
    model = moved(base, 2)
    for count in [trial.method.models] if trial.method.models else [2, 3]:
        _several(trial)
        halves = trial.method.takes == "weights" and trial.weighted and count == 2  # halves are exact, thirds are not
        got = trial.merge(base, [model] * count, trial.params(count, KEEP_ALL, [1 / count] * count))
        _compare(got, model, base, 0 if halves else 1, "result and model")


def _order(trial: Trial) -> None:
    """The order of the models, with their weights, changes nothing beyond rounding."""
    _several(trial)
    base, count = make_base(), trial.count(3)
    weights = [0.25 + 0.125 * number for number in range(count)]
    if trial.draws(trial.params(count, KEEP_HALF, weights), count):
        raise Inapplicable("what it draws at random belongs to a model's place")
    models = [moved(base, 10 + number) for number in range(count)]
    first = trial.merge(base, models, trial.params(count, KEEP_HALF, weights))
    for turned in (lambda row: row[::-1], lambda row: [*row[1:], row[0]]):
        got = trial.merge(base, turned(models), trial.params(count, KEEP_HALF, turned(weights)))
        _compare(got, first, base, ROUNDINGS, "results in two orders")


def _several(trial: Trial) -> None:
    if trial.method.models == 1:
        raise Inapplicable("it takes one model")


def _sign_tie(trial: Trial) -> None:
    """Values that cancel, at equal weights, give numbers."""
    _several(trial)
    base, count = make_base(), trial.count(2)
    random = torch.Generator().manual_seed(3)
    steps = {name: torch.randint(-8, 9, value.shape, generator=random) * GRID for name, value in base.items()}
    origin = base if trial.method.takes == "task_vectors" else {name: value * 0 for name, value in base.items()}
    both = [
        {name: (value.float() + sign * steps[name]).to(value.dtype) for name, value in origin.items()}
        for sign in (1, -1)
    ]
    for chosen in (KEEP_ALL, KEEP_HALF):
        got = trial.merge(base, [both[number % 2] for number in range(count)], trial.params(count, chosen))
        for name, value in got.items():
            check_finite(name, value)


def _negative(trial: Trial) -> None:
    """Weights of 1 and -1 give numbers; where the method is linear, equal models cancel exactly."""
    _several(trial)
    if not trial.weighted:
        raise Inapplicable("it takes no weights")
    if trial.method.parameters["weight"].complaint(-1.0) is not None:
        raise Inapplicable("its weights are not negative")
    base, count = make_base(), trial.count(2)
    plain = {name: False for name in trial.method.parameters if name.startswith("normalize")}
    params = trial.params(count, KEEP_ALL, [1.0, -1.0, *[0.0] * (count - 2)], **plain)
    for name, value in trial.merge(base, [moved(base, seed) for seed in range(count)], params).items():
        check_finite(name, value)
    got = trial.merge(base, [moved(base, 4)] * count, params)
    nothing = base if trial.method.takes == "task_vectors" else {name: value * 0 for name, value in base.items()}
    if trial.is_linear(params, count):
        _compare(got, nothing, base, 0, "a model less itself and nothing")


def _cuts(trial: Trial) -> None:
    """Chunks and workers change nothing, and the result equals the merge in memory."""
    weights = [0.3 + 0.2 * number for number in range(trial.count(3))]
    check_cuts(trial.method, trial.params(trial.count(3), KEEP_HALF, weights), trial.place, CUT, (TILE, 2 * TILE))


def _reload(trial: Trial) -> None:
    """The safetensors library reads the output back: names, shapes, types, numbers."""
    base, count = make_base(), trial.count(3)
    got = trial.merge(base, [moved(base, seed) for seed in range(count)], trial.params(count, KEEP_HALF), must=True)
    if got.keys() != base.keys():
        raise Broken("other names", f"the result holds {', '.join(sorted(got))}, the base {', '.join(sorted(base))}")
    for name, value in base.items():
        found, wanted = ((one.dtype, tuple(one.shape)) for one in (got[name], value))
        if found != wanted:
            raise Broken("other types", f"{name} was read back as {found}, {wanted} was written")
        check_finite(name, got[name])


CHECKS: dict[str, Callable[[Trial], None]] = {
    "one model": _one_model,
    "equal models": _equal_models,
    "order": _order,
    "sign tie": _sign_tie,
    "negative": _negative,
    "cuts": _cuts,
    "reload": _reload,
}
