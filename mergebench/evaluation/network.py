"""One candidate in memory as a transformers model in float32, with the tokenizer that lies beside it."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mergebench.errors import ModelError
from mergebench.evaluation.batch import one_thread
from mergebench.evaluation.task import LoadableModel

if TYPE_CHECKING:
    from collections.abc import Mapping

TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges*", "special_tokens_map*", "added_tokens*", "*.model", "*.tiktoken")
FOREIGN = "the checkpoint is incomplete, or the config belongs to another architecture"
DERIVED = ("position_ids", "inv_freq", "masked_bias")  # buffers that follow from the config


class Network:
    """A candidate's model, ready to run."""

    def __init__(self, model: LoadableModel, auto_class: str, device: torch.device) -> None:
        self.name = model.reference
        self.device = device
        self.directory = model.side_directory
        with one_thread():  # many small steps, which threads would only wait for one another in
            self.module: Any = _build(model, auto_class).to(device).eval()
            if device.type == "cpu" and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
                with quiet():
                    _pack(self.module)

    @property
    def hidden(self) -> int:
        """Width of the last states."""
        return int(self.module.config.hidden_size)

    def encode(self, tokens: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Last states [batch, tokens, hidden] and mask [batch, tokens] of texts padded to the longest of them."""
        width = max(1, *map(len, tokens)) if tokens else 1
        pad = self.module.config.pad_token_id or 0
        ids = torch.tensor([[*one, *[pad] * (width - len(one))] for one in tokens], device=self.device)
        mask = torch.tensor([[1] * len(one) + [0] * (width - len(one)) for one in tokens], device=self.device)
        return self.module(input_ids=ids, attention_mask=mask).last_hidden_state, mask

    def tokenize(self, texts: list[str], max_length: int) -> list[list[int]]:
        """Token ids of each text with the special ones, cut to `max_length` or to what the model takes."""
        limit = min(max_length, self.tokenizer.model_max_length)
        with quiet():
            ids: list[list[int]] = self.tokenizer(texts, truncation=True, max_length=limit)["input_ids"]
        return ids

    @cached_property
    def tokenizer_key(self) -> str:
        """Equal for tokenizers that give equal tokens: a hash of their files, wherever they lie."""
        digest = hashlib.sha256(self.module.config.model_type.encode())
        for file in self._tokenizer_files():
            content = file.read_bytes()
            digest.update(f"\n{file.name} {len(content)}\n".encode() + content)
        return digest.hexdigest()

    def _tokenizer_files(self) -> list[Path]:
        return sorted({file for pattern in TOKENIZER_FILES for file in self.directory.glob(pattern) if file.is_file()})

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer beside the model; `ModelError` where there is none."""
        from transformers import AutoTokenizer

        if not self._tokenizer_files():
            raise ModelError(f"model '{self.name}': no tokenizer in {self.directory}", "put tokenizer.json beside it")
        try:
            with quiet():
                return AutoTokenizer.from_pretrained(self.directory, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # transformers raises whatever its parts raise
            raise _failed(self.name, "its tokenizer", error) from None


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and load reports of transformers: what matters of them is raised as an error."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _build(model: LoadableModel, auto_class: str) -> Any:
    """The transformers model of these tensors; their names may be the files' or the module's."""
    import transformers

    if not (model.side_directory / "config.json").is_file():
        raise ModelError(
            f"model '{model.reference}': no config.json in {model.side_directory}",
            "to be measured, a model needs config.json and its tokenizer beside its weights",
        )
    tensors = model.state_dict()
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(
                model.side_directory, local_files_only=True, trust_remote_code=False
            )
            with torch.device("meta"):  # only to learn which class the config stands for
                architecture: Any = type(getattr(transformers, auto_class).from_config(config))
            module, report = architecture.from_pretrained(
                None,
                config=config,
                state_dict=tensors,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,  # they are in the report, with their names
                output_loading_info=True,
            )
    except Exception as error:  # transformers raises whatever its parts raise
        raise _failed(model.reference, "the model", error) from None
    _check(model.reference, report, tensors, architecture.base_model_prefix, auto_class)
    return module


def _pack(module: torch.nn.Module) -> None:
    """Give the linear layers to oneDNN: float32 as before, and on AMD's processors twice as fast as MKL."""
    from torch.utils.mkldnn import MkldnnLinear

    for name, child in module.named_children():
        if type(child) is torch.nn.Linear:
            setattr(module, name, MkldnnLinear(child, torch.float32))
        else:
            _pack(child)


def _check(name: str, report: Mapping[str, Any], tensors: Mapping[str, Tensor], prefix: str, auto_class: str) -> None:
    """Every tensor has a place and every place a tensor. Poolers and foreign heads are no loss to a bare encoder."""
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
                FOREIGN,
            )


def _failed(name: str, what: str, error: Exception) -> ModelError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ModelError(f"model '{name}': transformers cannot build {what}: {reason}")
