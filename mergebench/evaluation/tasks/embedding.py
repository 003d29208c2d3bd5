"""Embeddings: what a simple classifier can read from an encoder's features, the encoder frozen."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mergebench.errors import RecipeError, RunError
from mergebench.evaluation.labelled import Labelled, read_images, read_texts
from mergebench.evaluation.task import Common, Ready, Score, task
from mergebench.networks.features import POOLINGS, Pooling, features
from mergebench.networks.loadable import Tick
from mergebench.networks.network import Network
from mergebench.parameters import param
from mergebench.plugins import need

if TYPE_CHECKING:
    from torch import Tensor

NEIGHBOURS = 5


@dataclass(frozen=True, kw_only=True)
class Params(Common):
    data: Path = param(help="the items to answer, JSON lines: an id, a text or an image's path from here, a label each")
    train: Path = param(help="the items to learn from, in the same form; all of them are used")
    id: str = param("id", "the column with the item's id")
    text: str = param("text", "the column with the text")
    image: str | None = param(None, "the column with the image's path, where the items are images")
    label: str = param("label", "the column with the label")
    probe: str = param("linear", "logistic regression, or a vote of the nearest neighbours", choices=("linear", "knn"))
    k: int | None = param(None, f"how many neighbours vote, with probe: knn; {NEIGHBOURS} where not given", low=1)
    pooling: str = param("mean", "of the last states", choices=POOLINGS)
    normalize: bool = param(False, "features scaled to length one")
    max_length: int = param(128, "tokens a text is cut to", low=2)


@task(network="AutoModel")
def embedding(p: Params) -> Ready:
    """Accuracy of a linear probe or of nearest neighbours on an encoder's frozen features."""
    sklearn = need("scikit-learn", "embedding tasks")
    if p.k is not None and p.probe != "knn":
        raise RecipeError(f"k: {p.k}: a linear probe has no neighbours", "add probe: knn, or leave k out")
    train, data = _read(p, p.train), _read(p, p.data, p.limit, p.seed)
    data.known(set(train.labels), p.train)
    k = p.k or NEIGHBOURS
    if p.probe == "knn" and len(train.rows) < k:
        raise RunError(f"{p.train}: {len(train.rows)} items, k: {k} needs as many neighbours", "give a smaller k")
    if len(set(train.labels)) < 2:
        raise RunError(f"{p.train}: all items have the label '{train.labels[0]}'", "a probe tells labels apart")
    for item, where in data.items.items():
        if item in train.items:
            raise RunError(
                f"{where}: the same item is in {train.items[item]}", "what is learnt from is not measured on"
            )
    pooling = Pooling(p.pooling, p.normalize)
    answers = _linear if p.probe == "linear" else _nearest

    def measure(network: Network, tick: Tick) -> Score:
        known = features(train.inputs, network, pooling, lambda items: None)
        return data.score(answers(known, train.labels, features(data.inputs, network, pooling, tick), k))

    versions = {
        "scikit-learn": sklearn,
        **data.versions,
        **{f"train {name}": one for name, one in train.versions.items()},
    }
    return Ready(
        len(data.rows), measure, files=(p.data, p.train), items=data.items, asked=data.asked, versions=versions
    )


def _read(p: Params, file: Path, limit: int | None = None, seed: int | None = None) -> Labelled:
    if p.image is not None:
        return read_images(file, p.id, p.image, p.label, limit, seed)
    return read_texts(file, p.id, p.text, p.label, p.max_length, limit, seed)


def _linear(known: Tensor, labels: Sequence[str], asked: Tensor, k: int) -> Sequence[str]:
    """Logistic regression on standardized features, with an L2 penalty of C = 0.01."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    with threadpool_limits(1), warnings.catch_warnings(action="ignore"):
        return [str(label) for label in probe.fit(known.double().numpy(), labels).predict(asked.double().numpy())]


def _nearest(known: Tensor, labels: Sequence[str], asked: Tensor, k: int) -> Sequence[str]:
    """The label most of the k nearest items have, by Euclidean distance; of equal counts the first by name."""
    from sklearn.neighbors import KNeighborsClassifier
    from threadpoolctl import threadpool_limits

    probe = KNeighborsClassifier(k, algorithm="brute")
    with threadpool_limits(1):
        return [str(label) for label in probe.fit(known.double().numpy(), labels).predict(asked.double().numpy())]
