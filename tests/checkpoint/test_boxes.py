"""Boxes say where each element lies: random slices, transposes, joins and views, against torch's own."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from mergebench.checkpoint.boxes import Box, Laid, cut_flat, joined, through, whole


def positions(box: Box) -> tuple[Tensor, Tensor]:
    at, start = torch.tensor(box.at), torch.tensor(box.start)
    for count, step, stride in zip(box.counts, box.steps, box.strides, strict=True):
        at, start = at[..., None] + torch.arange(count) * step, start[..., None] + torch.arange(count) * stride
    return at, start


def values(laid: Laid, sources: dict[int, Tensor]) -> Tensor:
    out = torch.full((math.prod(laid.shape),), -1)
    for box in laid.boxes:
        at, start = positions(box)
        assert (out[at] == -1).all()
        out[at] = sources[box.source].reshape(-1)[start]
    return out.reshape(laid.shape)


def stored(shape: tuple[int, ...], sources: dict[int, Tensor]) -> tuple[Tensor, Laid]:
    number = len(sources)
    sources[number] = torch.arange(math.prod(shape)).reshape(shape) + 10_000 * number
    return sources[number], Laid(shape, tuple(whole(number, shape)))


def changed(value: Tensor, laid: Laid, sources: dict[int, Tensor], chance: random.Random) -> tuple[Tensor, Laid]:
    dim = chance.randrange(value.ndim)
    match chance.choice(["permute", "cut", "view", "join"]):
        case "permute":
            dims = chance.sample(range(value.ndim), value.ndim)
            return value.permute(dims).contiguous(), laid.permuted(dims)
        case "cut":
            first = chance.randrange(value.shape[dim])
            stop, step = chance.randrange(first + 1, value.shape[dim] + 1), chance.choice([1, 1, 2])
            cut = value[(slice(None),) * dim + (slice(first, stop, step),)]
            return cut.contiguous(), laid.cut(dim, first, stop, step)
        case "view":
            left, shape = value.numel(), []
            while left > 1:
                shape.append(chance.choice([size for size in range(2, left + 1) if left % size == 0]))
                left //= shape[-1]
            return value.reshape(shape or [1]), laid.reshaped(shape or [1])
        case _:
            parts = [(value, laid)]
            for _ in range(chance.choice([1, 2])):
                shape = list(value.shape)
                shape[dim] = chance.choice([1, 2, 3])
                parts.append(stored(tuple(shape), sources))
            chance.shuffle(parts)
            return torch.cat([one for one, _ in parts], dim), joined([one for _, one in parts], dim)


@pytest.mark.parametrize("seed", range(150))
def test_random_changes(seed: int) -> None:
    chance, sources = random.Random(seed), dict[int, Tensor]()
    value, laid = stored(tuple(chance.choice([1, 2, 3, 4, 6]) for _ in range(chance.choice([1, 2, 3]))), sources)
    for _ in range(chance.choice([1, 2, 3, 4])):
        value, laid = changed(value, laid, sources, chance)
    assert torch.equal(values(laid, sources), value) and laid.is_complete
    fewer = Laid(laid.shape, tuple(box.with_fewest_axes() for box in laid.boxes))
    assert torch.equal(values(fewer, sources), value)
    first = chance.randrange(value.numel())
    stop = chance.randrange(first + 1, value.numel() + 1)
    part = values(Laid((value.numel(),), tuple(cut_flat(fewer.boxes, first, stop))), sources)
    assert torch.equal(part[first:stop], value.reshape(-1)[first:stop])
    assert (part[:first] == -1).all() and (part[stop:] == -1).all()
    # the same tensor in parts, each stored permuted: its sources are boxes of those
    dim, others, parts = chance.randrange(value.ndim), dict[int, Tensor](), []
    size = value.shape[dim]
    ends = sorted(chance.sample(range(1, size), min(chance.choice([0, 1, 2]), size - 1)))
    for number, (start, end) in enumerate(pairwise([0, *ends, size])):
        dims = chance.sample(range(value.ndim), value.ndim)
        others[number] = value.narrow(dim, start, end - start).permute(dims).contiguous()
        stored_whole = Laid(tuple(others[number].shape), tuple(whole(number, others[number].shape)))
        parts.append(stored_whole.permuted([dims.index(k) for k in range(len(dims))]))
    boxes: dict[int, list[Box]] = {}
    for source, box in through(joined(parts, dim), laid):
        boxes.setdefault(source, []).append(box)
    assert sum(box.numel for several in boxes.values() for box in several) == value.numel()
    for source, several in boxes.items():
        found = values(Laid(tuple(sources[source].shape), tuple(several)), others)
        assert torch.equal(found[found != -1], sources[source][found != -1])


def test_of_no_elements_there_is_no_box() -> None:
    assert whole(0, (0, 3)) == []
