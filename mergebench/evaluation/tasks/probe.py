"""Probe: how a behaviour probe sees texts in a model's states, such as before and after an edit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.nn.functional import softplus

from mergebench.editing.probes.labels import UNDESIRED, word
from mergebench.editing.probes.layers import Reading, features
from mergebench.editing.probes.probe import Probe, read_probe
from mergebench.editing.probes.settings import Norm, Pool
from mergebench.errors import ModelError, RecipeError, did_you_mean
from mergebench.evaluation.task import Common, Direction, Prediction, Ready, Score, accuracy, asked, mean, task
from mergebench.networks.features import Texts
from mergebench.networks.items import Row, contents, read_rows, some, texts
from mergebench.networks.loadable import Tick
from mergebench.networks.network import Network
from mergebench.parameters import param

CLASSES = ("desired", "undesired")
HOW = ("layer", "norm", "pool", "max_length")  # what a fitted probe says of itself


@dataclass(frozen=True, kw_only=True)
class Params(Common):
    probe: Path = param(help="the probe's file, as `mergebench probe fit` writes it")
    data: Path = param(help="JSON: an id, a text and a label each")
    id: str = param("id", "the column with the item's id")
    text: str = param("text", "the column with the text")
    label: str = param("label", "the column with the label")
    undesired: str | None = param(None, "the label of the undesired class; 1, true and undesired are by themselves")
    of: str = param("both", "of which class the items are measured", choices=("both", *CLASSES))
    metric: str = param("loss", "what is measured of the probe", choices=("loss", "accuracy", "score"))
    layer: int | None = param(None, "for a probe that does not say it: the layer it reads, -1 for the last")
    norm: Norm | None = param(None, "for a probe that does not say it: the last layer after the final norm or before")
    pool: Pool | None = param(None, "for a probe that does not say it: over the tokens")
    max_length: int | None = param(None, "for a probe that does not say it: tokens a text is cut to", low=2)


@task(network="AutoModel")
def probe(p: Params) -> Ready:
    """How a behaviour probe sees texts in a model's states: its loss, accuracy or score.

    loss: cross-entropy of the item's own class (Wang et al., arXiv:2407.08770, table 13: an edit away from a behaviour
    raises it on undesired texts and lowers it on desired ones). score: the logit of undesired minus that of desired.
    """
    found = read_probe(p.probe)
    reading = _reading(p, found)
    rows = read_rows(p.data, p.id, (p.text, p.label))
    signs = _signs(p, rows)
    wanted = [row for row in rows if p.of in ("both", CLASSES[signs[row.id] > 0])]
    if not wanted:
        raise RecipeError(f"{p.data}: no item is {p.of}", "leave of: out, or take other data")
    rows = some(wanted, p.limit, p.seed)
    written = texts(rows, p.text)
    inputs = Texts(written, reading.max_length)
    right = [CLASSES[signs[row.id] > 0] for row in rows]

    def measure(network: Network, tick: Tick) -> Score:
        if network.hidden != found.width:
            what = f"{p.probe}: the probe reads {found.width} features, {network.name} has {network.hidden}"
            raise ModelError(what, "it was fitted on another model")
        logits = found.logit(_features(network, inputs, reading, tick)).tolist()
        return _score(p, [row.id for row in rows], logits, [signs[row.id] for row in rows])

    return Ready(len(rows), measure, files=(p.data, p.probe), items=contents(rows), asked=asked(rows, written, right))


def _reading(p: Params, probe: Probe) -> Reading:
    """How the probe was fitted, or what the task says of one that does not tell."""
    given = {name: getattr(p, name) for name in HOW if getattr(p, name) is not None}
    known = {name: probe.about[name] for name in HOW if probe.about.get(name) is not None}
    for name, value in given.items():
        if known.get(name, value) != value:
            raise RecipeError(f"{name}: {value}: {p.probe} was fitted with {known[name]}", f"leave {name} out")
    return Reading(**{**given, **known})


def _signs(p: Params, rows: Sequence[Row]) -> dict[str, int]:
    """1 for undesired, -1 for desired, by the items' ids."""
    labels = {row.id: word(row.values[1], row.where, p.label) for row in rows}
    known = sorted(set(labels.values()))
    bad = UNDESIRED if p.undesired is None else (p.undesired,)
    if not set(bad) & set(known):
        if p.undesired is not None:
            raise RecipeError(f"{p.data}: no label is '{p.undesired}'", did_you_mean(p.undesired, known))
        if len(known) > 1:
            raise RecipeError(
                f"{p.data}: its labels are {', '.join(known[:5])}: which is undesired?", "undesired: LABEL"
            )
    return {item: 1 if label in bad else -1 for item, label in labels.items()}


def _features(network: Network, texts: Texts, reading: Reading, tick: Tick) -> Tensor:
    """[texts, width]; made once for all probes that read these texts alike."""
    key = texts.key, reading
    if key in network.kept:
        tick(len(texts))
    else:
        network.kept[key] = features(network, texts, reading, tick)
    return network.kept[key]


def _score(p: Params, items: Sequence[str], logits: Sequence[float], signs: Sequence[int]) -> Score:
    predictions = {}
    for item, logit, sign in zip(items, logits, signs, strict=True):
        loss = softplus(Tensor([-sign * logit])).item()
        value = {"loss": loss, "accuracy": float((logit > 0) == (sign > 0)), "score": logit}[p.metric]
        predictions[item] = Prediction(CLASSES[logit > 0], value)
    if p.metric == "accuracy":
        return accuracy(predictions)
    way: Direction = "higher" if p.metric == "loss" and p.of == "undesired" else "lower"
    return mean(predictions, p.metric, way)
