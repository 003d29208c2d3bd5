"""Inputs and stored outputs of the MOS goldens (mos.safetensors): a tiny ViT, three adapters, images, a head.

Only outputs are stored; the inputs are made again here, out of PCG64's raw 64-bit words with + - * / alone, so they
are bitwise the same everywhere. ``sha256`` of them is in the file's metadata all the same.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch

FILE = Path(__file__).with_name("mos.safetensors")

WIDTH, DEPTH, HEADS, MLP, IMAGE, PATCH, RANK = 32, 12, 4, 32, 16, 8, 4
SCALE, ALPHA = 0.1, 0.1
TASKS = 3  # of two classes each
LEARNT, ASKED = 12, 40  # images of the task that is trained, six of each class; images that are evaluated
PASSES = ((16, 2), (5, 1))  # evaluations of all images, by batch size: how many in a row
EPOCHS, LR, WEIGHT_DECAY, ORTHOGONALITY = 4, 0.5, 0.05, 0.1  # of one batch; rates at which every part matters
STATISTICS_BATCH = 3  # images of a class in a forward pass: two passes a class

ADAPTER = {"down.weight": (RANK, WIDTH), "down.bias": (RANK,), "up.weight": (WIDTH, RANK), "up.bias": (WIDTH,)}
BLOCKS = [f"layers.{number}" for number in range(DEPTH)]


class Source:
    """float32 numbers between -1 and 1."""

    def __init__(self, seed: int):
        self.bits = np.random.PCG64(seed)

    def __call__(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        words = self.bits.random_raw(int(np.prod(shape))) >> np.uint64(11)
        values = (words.astype(np.float64) * 2.0**-52 - 1.0) * scale
        return torch.from_numpy(values.astype(np.float32).reshape(shape))


def backbone() -> dict[str, torch.Tensor]:
    """By the names that transformers' ViTModel has in memory."""
    source = Source(1)
    fan = {WIDTH: (3 / WIDTH) ** 0.5, 3 * PATCH * PATCH: (1 / (PATCH * PATCH)) ** 0.5}

    def linear(name: str, out: int, into: int) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": source(out, into, scale=fan[into]), f"{name}.bias": source(out, scale=0.2)}

    def norm(name: str) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": 1 + source(WIDTH, scale=0.3), f"{name}.bias": source(WIDTH, scale=0.2)}

    tensors = {
        "embeddings.cls_token": source(1, 1, WIDTH),
        "embeddings.position_embeddings": source(1, (IMAGE // PATCH) ** 2 + 1, WIDTH, scale=0.5),
        **linear("embeddings.patch_embeddings.projection", WIDTH, 3 * PATCH * PATCH),
    }
    for block in BLOCKS:
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            tensors |= linear(f"{block}.attention.{part}", WIDTH, WIDTH)
        tensors |= norm(f"{block}.layernorm_before") | norm(f"{block}.layernorm_after")
        tensors |= linear(f"{block}.mlp.fc1", MLP, WIDTH) | linear(f"{block}.mlp.fc2", WIDTH, MLP)
    projection = "embeddings.patch_embeddings.projection.weight"
    tensors[projection] = tensors[projection].reshape(WIDTH, 3, PATCH, PATCH)
    return tensors | norm("layernorm")


def adapter(task: int) -> dict[str, torch.Tensor]:
    """Of a task, 0 to TASKS - 1, as the bank stores it; TASKS: what the training of the second one starts from."""
    source = Source(10 + task)
    return {f"{block}.{part}": source(*shape, scale=0.6) for block in BLOCKS for part, shape in ADAPTER.items()}


def pixels(number: int, seed: int) -> torch.Tensor:
    """[number, 3, IMAGE, IMAGE]."""
    return Source(seed)(number, 3, IMAGE, IMAGE, scale=1.7)


def learnt() -> tuple[torch.Tensor, torch.Tensor]:
    """Training images, and the class of each within the task."""
    return pixels(LEARNT, 20), torch.arange(LEARNT) % 2


def asked() -> torch.Tensor:
    return pixels(ASKED, 21)


def head() -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of all classes after the last task."""
    source = Source(30)
    return source(2 * TASKS, WIDTH, scale=0.5), source(2 * TASKS, scale=0.2)


def prototypes() -> torch.Tensor:
    """Of all classes, under the first adapter."""
    return Source(31)(2 * TASKS, WIDTH)


def means() -> torch.Tensor:
    """Of the first task's classes, small: their products are logits of the orthogonality."""
    return Source(32)(2, WIDTH, scale=0.4)


def first_rows() -> tuple[torch.Tensor, torch.Tensor]:
    """The head's rows of the task that is trained, as `cil/training.py` draws them from a generator seeded 0."""
    generator, bound = torch.Generator().manual_seed(0), WIDTH**-0.5
    return (
        torch.rand(2, WIDTH, generator=generator) * 2 * bound - bound,
        torch.rand(2, generator=generator) * 2 * bound - bound,
    )


def sha256() -> str:
    """Of all inputs."""
    digest = hashlib.sha256()
    for tensors in (backbone(), *map(adapter, range(TASKS + 1))):
        for name in sorted(tensors):
            digest.update(tensors[name].numpy().astype("<f4").tobytes())
    for tensor in (learnt()[0], asked(), *head(), prototypes(), means()):
        digest.update(tensor.numpy().astype("<f4").tobytes())
    return digest.hexdigest()


def load() -> tuple[dict[str, torch.Tensor], dict]:
    """(tensors, metadata): see benchmarks/make_golden_mos.py for what is what."""
    from safetensors import safe_open

    with safe_open(FILE, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["about"])  # noqa: SIM118
