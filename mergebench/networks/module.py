"""Build a transformers model in float32 from a model's tensors, and replace its tensors by another model's."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from mergebench.checkpoint import Model
from mergebench.checkpoint.documents import document
from mergebench.checkpoint.layouts import in_memory, quiet, renamed
from mergebench.engine.machine import available_memory
from mergebench.errors import ModelError, RunError, first_line
from mergebench.networks.loadable import LoadableModel, network_tensors
from mergebench.networks.onednn import PackedLinear

FOREIGN = "the checkpoint is incomplete, or the config belongs to another architecture"
DERIVED = ("position_ids", "inv_freq", "masked_bias")  # buffers that follow from the config
NOISE = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")  # of a config.json


class Weights:
    """The place in a module of each tensor of a model's files, so that another model's tensors can replace them.

    Tensors that transformers converts, such as fused experts, have no such place; those it only renames have.
    """

    def __init__(self, module: Any, tensors: Mapping[str, Tensor]) -> None:
        self.shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self.places: dict[str, list[tuple[Any, str]]] | None = {}
        owners: dict[str, list[tuple[Any, str]]] = {}  # tied tensors have several
        same: dict[int, list[tuple[Any, str]]] = {}
        for path, child in module.named_modules(remove_duplicate=False):
            for name, value in chain(child.named_parameters(recurse=False), child.named_buffers(recurse=False)):
                owners[f"{path}.{name}".lstrip(".")] = same.setdefault(id(value), [])
                same[id(value)].append((child, name))
        prefix = f"{module.base_model_prefix}."
        names = {name: [name, prefix + name, name.removeprefix(prefix)] for name in tensors}
        if any(owners.keys().isdisjoint(several) for several in names.values()):
            layout = in_memory(tensors, module.config.to_dict(), type(module).__name__)
            for stored, name in renamed(layout, self.shapes).items():
                names[stored].append(name)
        for name, tensor in tensors.items():
            found = next((owners[n] for n in names[name] if n in owners), [])
            if any(not _same(getattr(*place), tensor) for place in found[:1]):
                self.places = None
                return
            self.places[name] = found
        covered = {place for places in self.places.values() for place in places}
        kept = module.state_dict().keys()  # other buffers follow from the config
        if any(not _idle(name) and not covered.issuperset(owners[name]) for name in kept):
            self.places = None

    def moved(self, old: Any, new: Any) -> None:
        """Record that the tensors of one module are now in another module."""
        for places in (self.places or {}).values():
            places[:] = [(new if module is old else module, name) for module, name in places]

    def settle(self) -> None:
        """Take the present values as those that were put."""
        self._versions = {id(value): value._version for value in self._values()}

    def _values(self) -> list[Tensor]:
        """The parameters and buffers that are not packed."""
        every = [place for places in (self.places or {}).values() for place in places]
        return [getattr(*place) for place in every if not _packed(place[0])]

    def put(self, tensors: dict[str, Tensor]) -> bool:
        """Replace the tensors, taking each out of `tensors`; returns False, with nothing changed, if they do not fit,
        or if the module itself changed its weights when it ran."""
        if self.places is None or {name: tensor.shape for name, tensor in tensors.items()} != self.shapes:
            return False
        if any(value._version != self._versions.get(id(value), 0) for value in self._values()):
            return False
        with torch.no_grad():
            for name in list(tensors):
                tensor = tensors.pop(name)  # its memory is needed for the next tensor
                for module, attribute in self.places[name]:
                    if _packed(module):
                        module.put(attribute, tensor)
                    else:
                        getattr(module, attribute).copy_(tensor)
        self.settle()
        return True


def build(model: LoadableModel, auto_class: str, device: torch.device, packed: bool = True) -> tuple[Any, Weights]:
    """A model ready to run, and the places of its tensors; not `packed` for one that is changed."""
    if isinstance(model, Model):
        _check_memory(model)
    tensors = network_tensors(model)
    module = _build(model, tensors, auto_class)
    weights = Weights(module, tensors)
    del tensors
    module = module.to(device).eval().requires_grad_(False)
    if packed and device.type == "cpu" and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        _pack(module, weights)
    weights.settle()
    return module, weights


def config_of(model: LoadableModel) -> dict[str, Any]:
    """The settings of the architecture in config.json."""
    path = model.side_directory / "config.json"
    missing = ModelError(
        f"model '{model.reference}': no config.json in {model.side_directory}",
        "to be measured, a model needs config.json and its tokenizer beside its weights",
    )
    config = document(path, missing=missing)
    return {key: value for key, value in config.items() if key not in NOISE}


def _check_memory(model: Model) -> None:
    """Check that memory suffices for the tensors in float32, the module, and memory not freed between (measured at 0.55
    B).

    Running out of memory would kill the whole program, not only this model.
    """
    need, free = 10 * sum(info.numel for info in model.tensors.values()), available_memory()
    if free is not None and need > free:
        what = f"measuring it takes {need / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"
        hint = "measure it where there is more; models are measured in float32"
        raise RunError(f"model '{model.reference}': {what}", hint)


def _build(model: LoadableModel, tensors: Mapping[str, Tensor], auto_class: str) -> Any:
    """The transformers model of these tensors; their names may be the files' or the module's."""
    import transformers

    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(
                model.side_directory, local_files_only=True, trust_remote_code=False
            )
            with torch.device("meta"):  # only to learn which class the config stands for
                auto = getattr(transformers, auto_class)
                architecture: Any = type(auto.from_config(config, trust_remote_code=False))
            module, report = architecture.from_pretrained(
                None,
                config=config,
                state_dict=dict(tensors),
                dtype=torch.float32,
                ignore_mismatched_sizes=True,  # the report has them, with their names
                output_loading_info=True,
                trust_remote_code=False,
            )
    except Exception as error:  # transformers lets any error of its parts through
        raise failed(model.reference, "the model", error) from None
    stored = config.architectures or [architecture.__name__]
    foreign = FOREIGN if architecture.__name__ in stored else f"it is a {stored[0]}, not a {architecture.__name__}"
    _check(model.reference, report, tensors, architecture.base_model_prefix, auto_class, foreign)
    return module


def _pack(module: torch.nn.Module, weights: Weights) -> None:
    """Give the linear layers to oneDNN."""
    for name, child in module.named_children():
        if type(child) is torch.nn.Linear:
            packed = PackedLinear(child)
            setattr(module, name, packed)
            weights.moved(child, packed)
        else:
            _pack(child, weights)


def _packed(module: Any) -> bool:
    return isinstance(module, PackedLinear) and module.packed is not None


def _same(one: Tensor, other: Tensor) -> bool:
    """Equal values; NaN is itself, here."""
    if torch.equal(one, other):
        return True
    return one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def _idle(name: str) -> bool:
    """Whether a tensor of a module affects no output, or follows from the config."""
    return name.endswith(DERIVED) or "pooler." in name


def _check(
    name: str, report: Mapping[str, Any], tensors: Mapping[str, Tensor], prefix: str, auto_class: str, foreign: str
) -> None:
    """Check that every tensor has a place and every place a tensor. A bare encoder may lack poolers and heads.

    foreign: the hint where a head is missing.
    """
    bare = auto_class == "AutoModel"
    headed = bare and any(tensor.startswith(f"{prefix}.") for tensor in tensors)

    def no_loss(key: str) -> bool:
        return key.endswith(DERIVED) or (bare and "pooler." in key) or (headed and not key.startswith(f"{prefix}."))

    missing = [key for key in report["missing_keys"] if not (bare and "pooler." in key)]
    unexpected = [key for key in report["unexpected_keys"] if not no_loss(key)]
    for key, found, wanted in sorted(report["mismatched_keys"]):
        raise ModelError(f"model '{name}': '{key}' has {list(found)}, its config.json asks for {list(wanted)}", FOREIGN)
    for keys, what in ((missing, "is missing"), (unexpected, "has no place")):
        if keys:
            more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
            raise ModelError(
                f"model '{name}': '{min(keys)}' {what} in the model of its config.json{more}",
                foreign if keys is missing else FOREIGN,
            )


def failed(name: str, what: str, error: Exception) -> ModelError:
    return ModelError(f"model '{name}': transformers cannot build {what}: {first_line(error)}")
