"""Real fine-tunes as each kind of adapter: what is kept at equal bytes, and whether a change is larger where the weight
is.

python benchmarks/kinds.py BASE FINE_TUNE ... [--ranks 16 2] [--out FILE]

Prints, for each fine-tune and for the bytes of a LoRA of each rank, the table of `adapters extract --as all --dry-run`;
then the correlation of |change| and |weight|, and the share of the squared change that each tenth of the weights holds,
by magnitude in its matrix (a tenth each, if the change does not depend on the weight).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from mergebench.adapters.fine_tune import Differences, Reading
from mergebench.adapters.kinds import measure_kinds
from mergebench.adapters.targets.lora import rank_bytes
from mergebench.checkpoint.files import Files


def tenths(base: str, model: str) -> tuple[list[float], int]:
    """The share of |D|^2 of the linear layers in each tenth of a matrix's elements, the smallest |W| first; and the
    bytes of one rank of a LoRA."""
    found = Differences(base, model)
    sums = torch.zeros(10, dtype=torch.float64)
    with Files() as files, torch.inference_mode():
        reading = Reading(found, files)
        for name in found.linear:
            if reading.squared_norms[name]:
                order = reading.base(name).flatten().abs().argsort()
                squares = reading.difference(name).flatten()[order].double().square()
                sums += torch.stack([part.sum() for part in squares.tensor_split(10)])
        return (sums / sums.sum()).tolist(), rank_bytes(reading)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("base")
    parser.add_argument("models", nargs="+")
    parser.add_argument("--ranks", nargs="+", type=int, default=[16, 2], help="whose bytes each kind may have")
    parser.add_argument("--out", type=Path, help="where all figures go as JSON")
    args = parser.parse_args()
    documents: list[dict[str, Any]] = []
    for model in args.models:
        shares, one = tenths(args.base, model)
        print(
            f"\n{model}\n  |change|^2 by tenths of |weight|: {' '.join(f'{share:.2%}' for share in shares)}", flush=True
        )
        for rank in args.ranks:
            started = time.perf_counter()
            kinds = measure_kinds(args.base, model, budget=rank * one)
            print(f"  {kinds.budget:,} bytes, rank {rank} ({time.perf_counter() - started:.0f} s)")
            for row in kinds.rows:
                words = [str(row.settings.get(key)) for key in ("mask", "scope") if row.settings.get(key)]
                more = f"  correlation {row.summary['correlation']:.4f}" if "correlation" in row.summary else ""
                print(
                    f"    {' '.join([row.kind, *words]):28} {row.nbytes:>10,} {row.kept:8.2%} {row.lora:8.2%}{more}",
                    flush=True,
                )
            documents.append(
                {"model": model, "rank": rank, "tenths": shares, "rows": [row._asdict() for row in kinds.rows]}
            )
    if args.out:
        args.out.write_text(json.dumps(documents, indent=1) + "\n")


if __name__ == "__main__":
    main()
