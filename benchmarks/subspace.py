"""What d numbers hold of a fine-tune: in a random subspace, beside d / D and a LoRA of as many numbers.

    python benchmarks/subspace.py BASE MODEL [MODEL ...] [--dimensions 100,1000,10000,100000]

The LoRA is the best there is: singular values of all linear layers, those worth most for each number that their vectors
take. Prints Markdown.
"""

from __future__ import annotations

import argparse
import time

import torch
from speed import commit

from mergebench.adapters.fine_tune import Differences, Reading
from mergebench.adapters.intrinsic_dimension import captured
from mergebench.checkpoint.files import Files


def as_lora(base: str, model: str, dimensions: list[int]) -> list[float]:
    """The share of the squared norm of the change that a LoRA of at most so many numbers can keep."""
    found, values, total = Differences(base, model), [], 0.0
    with Files() as opened, torch.inference_mode():
        reading = Reading(found, opened)
        for name in found.shapes:
            total += reading.squared_norm(name)
            if name in found.linear:
                size = sum(found.shape(name))
                squares = torch.linalg.svdvals(reading.difference(name)).double().square().tolist()
                values += [(square / size, size, square) for square in squares]
    kept = []
    for dimension in dimensions:
        left, energy = dimension, 0.0
        for _, size, square in sorted(values, reverse=True):
            if size <= left:
                left, energy = left - size, energy + square
        kept.append(energy / total)
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("models", nargs="+")
    parser.add_argument("--dimensions", default="100,1000,10000,100000")
    arguments = parser.parse_args()
    dimensions = [int(word) for word in arguments.dimensions.split(",")]
    print(f"commit {commit()}\n\n| fine-tune | d | d / D | DID | SAID | LoRA of d numbers |\n|---|" + "---:|" * 5)
    for model in arguments.models:
        started = time.perf_counter()
        did = captured(arguments.base, model, dimensions)
        print(f"<!-- DID {[one.energy for one in did]} -->", flush=True)
        said = captured(arguments.base, model, dimensions, said=True)
        for one, two, lora in zip(did, said, as_lora(arguments.base, model, dimensions), strict=True):
            row = f"{one.expected:.3e} | {one.energy:.3e} | {two.energy:.3e} | {lora:.3e}"
            print(f"| {model.rpartition('/')[2]} | {one.dimension:,} | {row} |", flush=True)
        print(f"<!-- {time.perf_counter() - started:.0f} s -->", flush=True)


if __name__ == "__main__":
    main()
