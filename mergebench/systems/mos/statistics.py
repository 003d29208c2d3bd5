"""Class statistics that replace the items: one or several Gaussians of the features, to draw from later.

SLCA (arXiv:2303.05118) aligns a classifier with features drawn from such Gaussians; MOS (arXiv:2412.09441) does so with
features under each task's own adapter. Of a class's n features, as MOS's code keeps them:

    covariance   mean and sample covariance (n - 1) + 1e-4 I
    variance     mean and the diagonal of that
    centroids    the means of ten clusters and the variance (n) within each; a draw is from a cluster at random,
                 of variance + 1e-4. Clusters of no variance, such as single items, are drawn from where a class has
                 no others. Ten of everything: a class of fewer items has them several times.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Generator, Tensor

from mergebench.engine.machine import one_thread
from mergebench.errors import RunError
from mergebench.plugins import need

KINDS = ("covariance", "variance", "centroids")
RIDGE = 1e-4
CENTROIDS = 10


@dataclass(frozen=True)
class ClassStatistics:
    """Of the c classes of a task, with features of width d; float32."""

    kind: str
    count: Tensor  # [c] int64: items
    mean: Tensor  # [c, d]
    spread: Tensor  # covariance [c, d, d], variance [c, d], centroids [c, 10, d]
    within: Tensor | None = None  # [c, 10, d]: the variances around centroids

    def tensors(self) -> dict[str, Tensor]:
        """As a file holds them: `count`, `mean`, the spread by its kind's name, `within` beside centroids."""
        found = {"count": self.count, "mean": self.mean, self.kind: self.spread}
        return found if self.within is None else {**found, "within": self.within}

    @staticmethod
    def of_tensors(tensors: Mapping[str, Tensor]) -> ClassStatistics:
        """The inverse of `tensors`."""
        kind = next(kind for kind in KINDS if kind in tensors)
        return ClassStatistics(kind, tensors["count"], tensors["mean"], tensors[kind], tensors.get("within"))

    def draw(self, number: int, generator: Generator) -> Tensor:
        """[c, number, d] features."""
        classes, width = self.mean.shape
        noise = torch.randn(classes, number, width, generator=generator)
        if self.kind == "covariance":
            return torch.baddbmm(self.mean[:, None], noise, self._roots.mT)
        if self.within is None:
            return self.mean[:, None] + noise * self.spread.sqrt()[:, None]
        alive = self.within.sum(2) > 0
        alive[~alive.any(1)] = True
        chosen = torch.multinomial(alive.float(), number, replacement=True, generator=generator)
        place = chosen[..., None].expand(-1, -1, width)
        return self.spread.gather(1, place) + noise * (self.within.gather(1, place) + RIDGE).sqrt()

    @cached_property
    def _roots(self) -> Tensor:
        """[c, d, d]: the Cholesky factors of the covariances; of those in float32 that the ridge made definite."""
        return torch.stack([torch.linalg.cholesky(one.double()).float() for one in self.spread])


def of_classes(
    features: Tensor, labels: Tensor, names: Sequence[str], kind: str, generator: Generator
) -> ClassStatistics:
    """The statistics of a task's classes, named `names`; the generator is what the clusters are found by.

    features [n, d]; labels [n]: 0 to c - 1. Raises `RunError` for a class without items, with a single one where its
    spread is asked for, and with features that are not finite or too large.
    """
    with one_thread():
        groups = [_checked(features[labels == number].double(), name, kind) for number, name in enumerate(names)]
        count = torch.tensor([len(group) for group in groups])
        mean = torch.stack([group.mean(0) for group in groups]).float()
        if kind == "centroids":
            found = [_clusters(group, generator) for group in groups]
            spread, within = (torch.stack(part).float() for part in zip(*found, strict=True))
        else:
            of, within = _covariance if kind == "covariance" else _variance, None
            spread = torch.stack([of(group).float() for group in groups])
    for name, one in zip(names, spread, strict=True):
        if not one.isfinite().all():
            raise RunError(f"class '{name}': its {kind} is beyond float32", "its features are far too large")
    return ClassStatistics(kind, count, mean, spread, within)


def _checked(rows: Tensor, name: str, kind: str) -> Tensor:
    if len(rows) == 0:
        raise RunError(f"class '{name}': it has no items", "give it items, or leave it out of its task")
    if len(rows) == 1 and kind != "centroids":
        what = f"class '{name}': it has 1 item, its {kind} takes at least 2"
        raise RunError(what, "give it a second one, or choose statistics: centroids, which take one")
    if not rows.isfinite().all():
        raise RunError(f"class '{name}': its features are not finite", "look for NaN or Inf in backbone and adapter")
    return rows


def _covariance(rows: Tensor) -> Tensor:
    """Sample covariance + 1e-4 I; more where float32 could not tell that from a matrix which is not definite."""
    covariance = rows.T.cov()
    ridge = max(RIDGE, torch.finfo(torch.float32).eps * covariance.trace().item())
    return covariance + ridge * torch.eye(len(covariance), dtype=torch.float64)


def _variance(rows: Tensor) -> Tensor:
    return rows.var(0) + RIDGE


def _clusters(rows: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Means and variances [10, d] of the clusters that k-means finds from a start of the generator's."""
    need("scikit-learn", "statistics: centroids")
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    number = min(CENTROIDS, len(set(map(tuple, rows.tolist()))))
    state = int(torch.randint(2**31, (), generator=generator))
    with threadpool_limits(1), warnings.catch_warnings(action="ignore"):
        label = torch.from_numpy(KMeans(number, n_init=1, random_state=state).fit(rows.numpy()).labels_)
    clusters = [rows[label == one % number] for one in range(CENTROIDS)]
    return torch.stack([one.mean(0) for one in clusters]), torch.stack([one.var(0, correction=0) for one in clusters])
