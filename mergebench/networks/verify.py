"""Check that transformers accepts a checkpoint: names and shapes, without data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mergebench.checkpoint.layouts import quiet
from mergebench.checkpoint.model import Model
from mergebench.errors import RecipeError, RunError, first_line


def check_known(model: Model) -> None:
    """`RecipeError` if transformers has no models of this kind, so that their merges cannot be verified."""
    config, name = model.config, f"'{model.reference}'"
    if model.naming.pipeline:
        raise RecipeError(f"--verify: transformers cannot load {name}: it is a pipeline of diffusers", "leave it out")
    if not config:
        what = f"--verify needs a config.json, and none goes along with {name}"
        raise RecipeError(what, "leave it out, or name a directory that has one")
    from transformers import CONFIG_MAPPING

    kind = config.get("model_type")
    if kind in CONFIG_MAPPING:
        return
    why = f"it knows no model_type '{kind}', and code beside a model is never run"
    if kind is None:
        class_ = config.get("_class_name")
        why = "config.json has no model_type" if class_ is None else f"it is a {class_} of diffusers"
    raise RecipeError(f"--verify: transformers cannot load {name}: {why}", "leave it out")


def verify(directory: Path) -> None:
    """Load the result on `meta` with transformers: no missing, unexpected or mismatched tensor."""
    hint = f"the checkpoint in {directory} is complete: the same command with --resume, without --verify, publishes it"
    try:
        with quiet():
            info = _loading_info(directory)
    except Exception as error:  # transformers raises whatever its parts raise
        raise RunError(f"{directory}: transformers cannot load it: {first_line(error)}", hint) from None
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(kind):
            raise RunError(
                f"{directory}: transformers finds {kind.replace('_', ' ')}: {sorted(map(str, info[kind]))[0]}",
                hint,
            )


def _loading_info(directory: Path) -> dict[str, Any]:
    import torch
    import transformers

    from mergebench.checkpoint.files import TORCH_DTYPE
    from mergebench.deltas.open import open_model

    class OnMeta(torch.Tensor):
        """A tensor that stays on `meta`, because loading to `meta` by `device_map` needs accelerate."""

        def to(self, *where: Any, dtype: torch.dtype | None = None, **how: Any) -> torch.Tensor:
            return torch.empty(self.shape, dtype=dtype or self.dtype, device="meta")

    model = open_model(str(directory))
    config = transformers.AutoConfig.from_pretrained(model.side_directory, trust_remote_code=False)
    architectures = getattr(config, "architectures", None)
    name = str(architectures[0] if isinstance(architectures, list) and architectures else "AutoModel")
    loader: Any = getattr(transformers, name, None)
    if name != "AutoModel" and not (isinstance(loader, type) and issubclass(loader, transformers.PreTrainedModel)):
        raise ValueError(f"it has no model class {name!r:.60}")
    tensors = {
        name: torch.empty(info.shape, dtype=TORCH_DTYPE[info.dtype], device="meta").as_subclass(OnMeta)
        for name, info in model.tensors.items()
        if "/" not in name  # of a module in a folder
    }
    _, info = loader.from_pretrained(
        None,
        config=config,
        state_dict=tensors,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        trust_remote_code=False,
    )
    return dict(info)
