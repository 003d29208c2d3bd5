"""An encoder's features of image files, prepared by the model's image processor."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergebench.checkpoint.documents import read_bytes
from mergebench.checkpoint.layouts import quiet
from mergebench.engine.machine import available_memory
from mergebench.errors import ModelError, RunError, first_line
from mergebench.networks.features import Pooling
from mergebench.networks.network import Network

PROCESSOR = "preprocessor_config.json"


def check_image(file: Path, where: str) -> str:
    """The SHA-256 of an image file; `RunError` if it is missing or Pillow cannot identify it."""
    from PIL import Image

    try:
        content = read_bytes(file)
    except OSError as error:
        raise RunError(f"{where}: {file}: {error.strerror}", "paths are relative to the data file's folder") from None
    try:
        with warnings.catch_warnings(action="error"), Image.open(io.BytesIO(content)) as image:
            image.verify()
    except Exception as error:  # Pillow raises whatever its decoders raise
        raise RunError(f"{where}: {file} is not an image that Pillow reads: {first_line(error)}") from None
    return hashlib.sha256(content).hexdigest()


class Images:
    """Image files. They are read again each time, because decoding costs little compared to encoding."""

    def __init__(self, files: Sequence[Path], hashes: Sequence[str]) -> None:
        self.files = list(files)
        self.key = hashlib.sha256("".join(hashes).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.files)

    def lengths(self, network: Network) -> list[int]:
        """All equal, because image processors give one size."""
        height, width = self._pixels(network, 0).shape[1:]
        return [_patches(network, height, width)] * len(self.files)

    def rows(self, network: Network, positions: Sequence[int], pooling: Pooling) -> Tensor:
        pixels = [self._pixels(network, i) for i in positions]
        alike = len({one.shape for one in pixels}) == 1
        parts = [torch.stack(pixels)] if alike else [one[None] for one in pixels]
        return torch.cat([pooling(*_encode(network, part, pooling)) for part in parts])

    def held(self, network: Network) -> Images:
        """The images for repeated reading: prepared once, and kept in memory if they fit into a quarter of the free
        memory."""
        free, one = available_memory(), self._pixels(network, 0)
        if free is not None and 4 * len(self) * one.numel() * one.element_size() > free:
            return self
        return Prepared(self, network)

    def _pixels(self, network: Network, position: int) -> Tensor:
        return _pixels(_processor(network), self.files[position], network.name)


class Prepared(Images):
    """Images prepared once and held in memory, for an encoder that reads them many times."""

    def __init__(self, images: Images, network: Network) -> None:
        self.files, self.key = images.files, images.key
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            self._held = list(pool.map(lambda i: images._pixels(network, i), range(len(images))))

    def _pixels(self, network: Network, position: int) -> Tensor:
        return self._held[position]


def _encode(network: Network, pixels: Tensor, pooling: Pooling) -> tuple[Tensor, Tensor]:
    """Last states [batch, tokens, hidden] of images [batch, channels, height, width], and which tokens are patches."""
    try:
        states = network.module(pixel_values=pixels.to(network.device)).last_hidden_state
    except (AttributeError, TypeError, ValueError) as error:  # transformers' errors for wrong sizes and inputs
        shape = "x".join(map(str, pixels.shape[1:]))
        raise ModelError(f"model '{network.name}': it takes no images of {shape}: {first_line(error)}") from None
    patches = _patches(network, *pixels.shape[2:])
    others = states.shape[1] - patches if states.ndim == 3 else -1  # class token and registers, which come first
    if others < 0 or (others == 0 and "cls" in pooling.how):
        lacks = "no class token" if others == 0 else f"last states {list(states.shape)}, not one for each patch"
        raise ModelError(f"model '{network.name}': it has {lacks}", "pooling: mean" if others == 0 else None)
    mask = torch.ones(states.shape[:2], device=states.device)
    mask[:, :others] = 0
    return states, mask


def _patches(network: Network, height: int, width: int) -> int:
    size = getattr(network.module.config, "patch_size", None)
    if size is None:
        raise ModelError(f"model '{network.name}': its config.json has no patch_size", "take an encoder of patches")
    down, across = (size, size) if isinstance(size, int) else size
    return (height // down) * (width // across)


def _pixels(processor: Any, file: Path, name: str) -> Tensor:
    """[channels, height, width]"""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(read_bytes(file))) as image:
            picture = image.convert("RGB")
    except Exception as error:  # Pillow raises whatever its decoders raise
        raise RunError(f"{file}: cannot be decoded: {first_line(error)}") from None
    try:
        pixels: Tensor = processor(picture, return_tensors="pt")["pixel_values"][0]
    except Exception as error:  # transformers raises whatever its parts raise
        raise ModelError(f"model '{name}': its image processor fails at {file}: {first_line(error)}") from None
    return pixels


def _processor(network: Network) -> Any:
    """The image processor beside the model, read once."""
    if network.image_processor is None:
        network.image_processor = _read_processor(network)
    return network.image_processor


def _read_processor(network: Network) -> Any:
    from transformers import AutoImageProcessor

    if not (network.directory / PROCESSOR).is_file():
        hint = "to be measured on images, a model needs its image processor's file beside its weights"
        raise ModelError(f"model '{network.name}': no {PROCESSOR} in {network.directory}", hint)
    try:
        with quiet():  # Pillow's way everywhere: torchvision's rounds otherwise, and is not everywhere
            return AutoImageProcessor.from_pretrained(  # type: ignore[no-untyped-call]
                network.directory, local_files_only=True, trust_remote_code=False, backend="pil"
            )
    except Exception as error:  # transformers raises whatever its parts raise
        what = f"model '{network.name}': transformers cannot read its {PROCESSOR}: {first_line(error)}"
        raise ModelError(what) from None
