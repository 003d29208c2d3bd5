"""Run a model once over texts, and write what a data-driven merge method reads of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergebench.checkpoint.content import identity
from mergebench.checkpoint.files import write_error
from mergebench.checkpoint.measured import FILE, Measured, read_measured, write_measured
from mergebench.checkpoint.model import Model
from mergebench.deltas.open import open_model
from mergebench.errors import ModelError, RecipeError, RunError
from mergebench.networks.device import device_of, versions
from mergebench.networks.loadable import Tick, ticking
from mergebench.networks.network import Network
from mergebench.parameters import make_params
from mergebench.systems.on_data.answers import LONGEST, answers_of, needs_labels
from mergebench.systems.on_data.fisher import fisher_of
from mergebench.systems.on_data.gram import Linears, grams
from mergebench.systems.on_data.settings import Settings
from mergebench.systems.on_data.texts import Data, read_data
from mergebench.systems.on_data.weights import check_memory

KINDS = ("fisher", "gram")
Progress = Callable[[int, int], None]  # texts done, of all


def make_statistics(
    model: str,
    data: str | Path,
    out: str | Path,
    *,
    kind: str,
    device: str = "auto",
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
    **settings: Any,
) -> Measured:
    """Run `model` over the texts in `data`, and write its statistics of a kind into the directory `out`.

    kind: gram (means of x x^T of the inputs of linear layers; no labels are read) or fisher (mean squared gradients of
    log p(y | x)). settings: those of `Settings`. Raises `RecipeError` if a setting is wrong, `ModelError` if the model
    cannot be run or has no head to answer with, `RunError` if the texts cannot be read or a value is not finite.
    """
    if kind not in KINDS:
        raise RecipeError(f"--kind: '{kind}' is no kind of statistics", " or ".join(KINDS))
    file = Path(out) / FILE
    if file.exists() and not overwrite:
        raise RecipeError(f"{file}: it exists", "replace it with --overwrite, or choose another --out")
    given = make_params(Settings, settings)
    opened = open_model(model, to_run=True)
    texts = read_data(Path(data), given, needs_labels(opened, kind, given))
    return measured(opened, texts, kind, file, device_of(device), ticking(progress, len(texts.texts)))


def measured(
    model: Model, data: Data, kind: str, file: Path, device: torch.device, tick: Tick, **made: Any
) -> Measured:
    """Run an opened model, and write its statistics; tick: called with the number of texts just done; made: more for
    the metadata."""
    check_one_stack(model)
    about: dict[str, Any] = {"kind": kind, **about_model(model), **data.about(), "made": {**versions(), **made}}
    if kind == "gram":
        network = Network(model, "AutoModel", device, packed=False)
        linears, tokens = Linears(network), network.tokenize(data.texts, data.settings.max_length or LONGEST)
        check_memory(model, 4 * sum(linears.width(name) ** 2 for name in linears.modules))
        values = grams(network, linears, linears.modules, tokens, tick)
        about["inputs_first"] = linears.inputs_first
    else:
        answers = answers_of(model, data.settings)
        network = Network(model, answers.auto_class, device, packed=False)
        tokens = network.tokenize(data.texts, answers.max_length)
        check_memory(model, 8 * sum(value.numel() for value in network.module.parameters()))
        values = fisher_of(network, answers, data, tokens, tick)
        floats = {name: info.shape for name, info in model.tensors.items() if info.is_float and "/" not in name}
        values |= {name: torch.zeros(shape) for name, shape in floats.items() if name not in values}
        about |= {"labels": data.settings.labels, "norm": norm(values.values())}
    about["tokens"] = sum(map(len, tokens))
    return write(file, values, about)


def about_model(model: Model) -> dict[str, Any]:
    """Which model statistics are of."""
    return {"model": {"reference": model.reference, "identity": identity(model)}}


def write(file: Path, values: Mapping[str, Tensor], about: Mapping[str, Any]) -> Measured:
    """Write statistics; `RunError` if a value is not finite."""
    for name, one in values.items():
        if not torch.isfinite(one).all():
            what = f"model '{about['model']['reference']}': its statistics of '{name}' are not finite"
            raise RunError(what, "look for NaN or Inf in its weights")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(file.parent, error) from None
    write_measured(file, {name: tuple(one.shape) for name, one in values.items()}, lambda name: values[name], about)
    return read_measured(file)


def norm(values: Iterable[Tensor]) -> float:
    """The L2 norm of all values together."""
    return math.sqrt(math.fsum(float(one.double().square().sum()) for one in values))


def check_one_stack(model: Model) -> None:
    """`ModelError` for a model that does not run on a text alone, or has parts that no weights of it hold."""
    if model.config.get("is_encoder_decoder"):
        what = f"model '{model.reference}': it is an encoder with a decoder"
        raise ModelError(what, "statistics are made of a model that is one stack of blocks")
    if model.modules:
        raise ModelError(f"model '{model.reference}': it has a module beside it", "merge the model without it")
