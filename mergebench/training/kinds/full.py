"""All weights of the model, written as a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mergebench.checkpoint.staging import scratch
from mergebench.deltas.formats.native import Writing, write_file
from mergebench.engine.plan import plan_merge
from mergebench.engine.run import run_plan
from mergebench.recipe import load
from mergebench.recipe.resolve import resolve
from mergebench.training.attached import Attached, Base
from mergebench.training.declared import Targets, trained


class _Full(Attached):
    def __init__(self, base: Base, weights: dict[str, Any]) -> None:
        places = base.network.places
        super().__init__({name: getattr(*places[name][0]) for name in weights})
        for one in self.parameters.values():
            one.requires_grad_()
        self._base = base

    def save(self, directory: Path) -> None:
        """A checkpoint in float32, its files laid out and named as the base's."""
        with scratch(directory / "weights") as place:
            new = {name: one.detach().cpu().contiguous() for name, one in self.parameters.items()}
            writings = {name: Writing("dense", {"replace": True}, {"values": values}) for name, values in new.items()}
            write_file(place / "trained.safetensors", writings)
            base = self._base.model
            files = [base.directory or base.headers[0].file, *base.adapters, place / "trained.safetensors"]
            model = "+".join(str(one.absolute()) for one in files)  # its reference may be relative to the config
            recipe = {"merge_method": "passthrough", "models": [{"model": model}], "out_dtype": "float32"}
            plan = plan_merge(resolve(load(recipe)))
            run_plan(plan, place / "model")
            for file in sorted((place / "model").iterdir()):
                if file.name != "mergebench.json":
                    file.rename(directory / file.name)

    def reference(self, base: str, directory: Path) -> str:
        """The checkpoint itself."""
        return str(directory)


@trained(paper="arXiv:1810.04805")
def full(base: Base, p: Targets) -> Attached:
    """All weights are trained, or those that `targets` name; a checkpoint is written."""
    weights = base.chosen(p.targets, lambda weight: True)
    return _Full(base, weights)
