"""Check that an edit keeps the rules: `check_edit(my_edit)` in a plugin's tests; `mergebench doctor` runs it too.

Each check works on a small gated model of two layers and a random probe. The oracle is the edit's own amounts: the
edited rows are rows + amount * direction, and reverting the patch gives the original model, bit for bit.
"""

from __future__ import annotations

import pickle
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mergebench.deltas.open import open_model
from mergebench.editing import edits
from mergebench.editing.apply import PutIn
from mergebench.editing.edit import Edit, Rows
from mergebench.editing.patches import open_patch, write_patch
from mergebench.editing.plan import Planned, plan_edit
from mergebench.editing.probes.probe import Probe
from mergebench.editing.scan import scan
from mergebench.editing.spec import Wanted
from mergebench.testing.checks import Inapplicable, Report, find

WIDTH, NEURONS, LAYERS = 12, 40, 2
CONFIG = {"model_type": "llama", "hidden_size": WIDTH, "num_hidden_layers": LAYERS}
GATE = "model.layers.{}.mlp.gate_proj.weight"


class Trial:
    """An edit with parameters, and the rows of a small model."""

    def __init__(self, edit: Edit, values: dict[str, Any], place: Path) -> None:
        self.edit, self.values, self.place = edit, values, place
        random = torch.Generator().manual_seed(0)
        self.weights = {GATE.format(n): torch.randn(NEURONS, WIDTH, generator=random) for n in range(LAYERS)}
        self.probe = Probe(torch.randn(2, WIDTH, generator=random), torch.zeros(2)).save(place / "probe.safetensors")
        self.params = edit.make_params({name: p.default for name, p in edit.parameters.items()} | values)

    def rows(self) -> Rows:
        """The input of the edit."""
        weights, direction = torch.cat([*self.weights.values()]), self.probe.weight[1]
        norm, length = weights.norm(dim=1), float(direction.norm())
        layer = torch.arange(LAYERS).repeat_interleave(NEURONS)
        return Rows(weights @ direction / (norm * length), norm, layer, length)

    def amounts(self) -> Tensor:
        return self.edit(self.rows(), self.params)

    def model(self, name: str) -> Path:
        """The model on disk, in bfloat16."""
        place = self.place / name
        place.mkdir()
        tensors = {name: weight.bfloat16() for name, weight in self.weights.items()}
        for name, weight in list(tensors.items()):
            tensors[name.replace("gate", "up")] = weight.flip(0).contiguous()
            tensors[name.replace("gate", "down")] = weight.T.contiguous()
        save_file(tensors, place / "model.safetensors")
        return place

    def planned(self, model: Path) -> Planned:
        opened = open_model(str(model))
        wanted = Wanted(self.edit.name, str(self.probe.file), target="gate_proj", values=self.values)
        return plan_edit(wanted, self.edit, self.probe.file, opened.tensors, CONFIG)


def _amounts(trial: Trial) -> None:
    """One finite float32 for each row."""
    amounts = trial.amounts()
    assert amounts.shape == (LAYERS * NEURONS,) and amounts.dtype == torch.float32, f"gave {list(amounts.shape)}"
    assert bool(amounts.isfinite().all()), "gave a number that is not finite"


def _pure(trial: Trial) -> None:
    """The edit does not write into its input, and two calls give the same result."""
    rows, fresh = trial.rows(), trial.rows()
    first, second = trial.edit(rows, trial.params), trial.edit(rows, trial.params)
    same = all(torch.equal(getattr(rows, name), getattr(fresh, name)) for name in ("cosine", "norm", "layer"))
    assert same, "it writes into its rows"
    assert torch.equal(first, second), "two calls give different amounts"


def _of_zeros(trial: Trial) -> None:
    """Rows of zeros are no error: planning tries an edit on them before a model is read."""
    nothing = torch.zeros(LAYERS * NEURONS)
    trial.edit(Rows(nothing, nothing, nothing.long(), 1.0), trial.params)


def _written(trial: Trial) -> None:
    """The patched model has rows + amount * direction, cast once."""
    model = trial.model("model")
    planned = trial.planned(model)
    amounts = scan(planned, open_model(str(model))).amounts
    edited = _edited(trial, model, planned)
    before = torch.cat([weight.bfloat16() for weight in trial.weights.values()])
    expected = (before.float() + amounts[:, None] * planned.direction).bfloat16()
    expected = torch.where(amounts[:, None] != 0, expected, before)
    tensors = open_model(str(edited)).state_dict()
    assert torch.equal(torch.cat([tensors[name] for name in trial.weights]), expected.float()), "other rows"


def _undone(trial: Trial) -> None:
    """Reverting the patch gives the original model, bit for bit."""
    model = trial.model("model")
    edited = _edited(trial, model, trial.planned(model))
    PutIn(open_patch(trial.place / "patch.safetensors"), revert=True).make(open_model(str(edited)))
    raw = [(place / "model.safetensors").read_bytes() for place in (model, edited)]
    assert raw[0] == raw[1], "other bytes"


def _edited(trial: Trial, model: Path, planned: Planned) -> Path:
    """A copy of the model with the edit applied as a patch."""
    changes = scan(planned, open_model(str(model))).changes()
    if not changes:
        raise Inapplicable("with these parameters it changes nothing")
    write_patch(trial.place / "patch.safetensors", open_model(str(model)), planned.direction, changes, frozenset(), {})
    edited = trial.place / "edited"
    shutil.copytree(model, edited)
    PutIn(open_patch(trial.place / "patch.safetensors")).make(open_model(str(edited)))
    return edited


def _pickles(trial: Trial) -> None:
    """The edit survives pickling."""
    assert pickle.loads(pickle.dumps(trial.edit)) is trial.edit, "another one"


CHECKS: dict[str, Callable[[Trial], None]] = {
    "amounts": _amounts,
    "pure": _pure,
    "zeros": _of_zeros,
    "written": _written,
    "undone": _undone,
    "pickles": _pickles,
}


def check_edit(edit: Edit, **values: Any) -> str:
    """Run every check on an edit, with these parameters; `AssertionError` names the first that fails.

    Returns what was checked, in one line.
    """
    missing = _missing(edit, values)
    assert missing is None, f"{edit.name}: '{missing}' has no default: give it to check_edit"
    passed = []
    for name, check in CHECKS.items():
        try:
            _run(edit, values, check)
        except Inapplicable:
            continue
        except AssertionError as error:
            raise AssertionError(f"{edit.name}: {name}: {error}") from None
        passed.append(name)
    return f"{edit.name} keeps the rules: {', '.join(passed)}"


def examine_edits() -> list[Report]:
    """All checks on every installed edit that has a default for each parameter."""
    reports = []
    for name in edits.names():
        findings = [find(check, partial(_run, edits.get(name), {}, run)) for check, run in CHECKS.items()]
        reports.append(Report(name, edits.origin(name), tuple(findings)))
    return reports


def _run(edit: Edit, values: dict[str, Any], check: Callable[[Trial], None]) -> None:
    missing = _missing(edit, values)
    if missing is not None:
        raise Inapplicable(f"'{missing}' has no default")
    with tempfile.TemporaryDirectory(prefix="mergebench-") as folder:
        check(Trial(edit, dict(values), Path(folder)))


def _missing(edit: Edit, values: Mapping[str, Any]) -> str | None:
    """A required parameter that is missing."""
    return next((name for name, p in edit.parameters.items() if p.required and name not in values), None)
