"""What a training step of HUT costs beside LoRA's, against the number of tokens: FLOPs, counted, and seconds.

    python benchmarks/hut_steps.py [MODEL] [--shape 384 1536] [--rank 8] [--tokens 32 ... ] [--plot FILE] [--out FILE]

First one linear layer of `--shape`, whose input needs its gradient too, as inside a network; then MODEL, with every
linear layer of its blocks changed. Products of matrices are counted, as torch.utils.flop_counter does; HUT's
element-wise products, 2 d k forward and d k backward, are not.

    forward     HUT 2 d k r         LoRA 2 n r (d + k)      beside 2 n d k of the layer itself
    backward    HUT 4 d k r + 2 n d k     LoRA 4 n r (d + k)    beside 2 n d k

HUT's own products are fewer from n = d k / (d + k) on. But its backward pass needs the gradient of the whole matrix,
2 n d k, which LoRA never makes. With it HUT is cheaper only if r > d k / (3 (d + k)), a sixth of the width of a square
layer, and from n = 3 d k r / (3 r (d + k) - d k) on.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from mergebench.checkpoint import drawing
from mergebench.deltas.multiplicative import Factors, multiplicative

TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
KINDS = ("hut", "lora")
Step = Callable[[int, bool], None]  # on so many tokens; with the backward pass or without


def flops(kind: str, d: int, k: int, r: int, n: int) -> tuple[int, int]:
    """Of the forward pass of one layer [d, k] on n tokens, and of a step, where the input needs its gradient."""
    if kind == "hut":
        return 2 * n * d * k + 2 * d * k * r, 6 * n * d * k + 6 * d * k * r
    return 2 * n * d * k + 2 * n * r * (d + k), 4 * n * d * k + 6 * n * r * (d + k)


class _Hut(nn.Module):
    def __init__(self, rows: int, columns: int, rank: int) -> None:
        super().__init__()
        self.b, self.a = nn.Parameter(torch.zeros(rows, rank)), nn.Parameter(torch.randn(rank, columns))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + multiplicative(Factors(self.b, self.a), slice(0, len(self.b)), weight)


def layer(kind: str, rows: int, columns: int, rank: int) -> Step:
    """A step of one linear layer with HUT, or with PEFT's LoRA."""
    linear = nn.Linear(columns, rows, bias=False).requires_grad_(False)
    module: Any = nn.Sequential(linear)
    if kind == "hut":
        parametrize.register_parametrization(linear, "weight", _Hut(rows, columns, rank), unsafe=True)
    else:
        import peft

        module = peft.get_peft_model(module, peft.LoraConfig(r=rank, target_modules=["0"]))

    def step(tokens: int, backward: bool = True) -> None:
        out = module(torch.ones(tokens, columns, requires_grad=True)).sum()
        if backward:
            out.backward()
            module.zero_grad()

    return step


def model(kind: str, reference: str, rank: int, length: int) -> Step:
    """A step of an encoder on texts of `length` tokens."""
    from mergebench.deltas.open import open_model
    from mergebench.networks.network import Network
    from mergebench.systems.hut import Params, hut
    from mergebench.training.attached import Base
    from mergebench.training.peft_adapters import peft_adapter

    opened = open_model(reference)
    network = Network(opened, "AutoModel", torch.device("cpu"), packed=False)
    base = Base(opened, network, Generator().manual_seed(0))
    if kind == "hut":
        hut(base, Params(rank=rank))
    else:
        names = [name.removesuffix(".weight") for name in base.matrices([])]
        peft_adapter(base, {"peft_type": "LORA", "r": rank, "target_modules": names})

    def step(tokens: int, backward: bool = True) -> None:
        ids = torch.full((max(tokens // length, 1), min(length, tokens)), 1000)
        out = network.module(input_ids=ids).last_hidden_state.sum()
        if backward:
            out.backward()
            network.module.zero_grad()

    return step


def count(step: Step, tokens: int) -> tuple[int, int]:
    """FLOPs of the products of matrices of a forward pass, and of a step."""
    found = []
    for backward in (False, True):
        with FlopCounterMode(display=False) as counter:
            step(tokens, backward)
        found.append(int(counter.get_total_flops()))
    return found[0], found[1]


def seconds(steps: dict[str, Step], tokens: int, repeats: int) -> dict[str, float]:
    """The shortest of several steps of each, in turns."""
    best = dict.fromkeys(steps, float("inf"))
    for _ in range(repeats + 1):
        for kind, step in steps.items():
            started = time.perf_counter()
            step(tokens, True)
            best[kind] = min(best[kind], time.perf_counter() - started)
    return best


def measure(what: str, steps: dict[str, Step], tokens: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """A row for each number of tokens, printed as it is made: what HUT takes, and over what LoRA takes."""
    print(f"\n{what}\n{'tokens':>8}  {'forward, GFLOP':>18} {'step, GFLOP':>18} {'step, ms':>18}")
    rows: list[dict[str, Any]] = []
    for n in tokens:
        counted = {kind: count(step, n) for kind, step in steps.items()}
        forward, step = ({kind: one[i] for kind, one in counted.items()} for i in (0, 1))
        rows.append({"tokens": n, "forward": forward, "step": step, "seconds": seconds(steps, n, repeats)})
        cells = [
            f"{rows[-1][key]['hut'] * scale:9.3f} {rows[-1][key]['hut'] / rows[-1][key]['lora']:7.3f}x"
            for key, scale in (("forward", 1e-9), ("step", 1e-9), ("seconds", 1e3))
        ]
        print(f"{n:8}  {' '.join(cells)}", flush=True)
    for key in ("forward", "step"):
        crossing = counted_crossing(rows, key)
        where = "nowhere" if crossing is None else f"from {crossing:.0f} tokens on"
        print(f"  {key}: HUT takes fewer FLOPs {where}")
    return rows


def counted_crossing(rows: Sequence[dict[str, Any]], key: str) -> float | None:
    """From how many tokens on HUT takes fewer FLOPs: both counts are linear in them. None: nowhere."""
    first, last = rows[0], rows[-1]
    before, after = (row[key]["lora"] - row[key]["hut"] for row in (first, last))
    if after <= before:
        return None
    return float(first["tokens"] - before * (last["tokens"] - first["tokens"]) / (after - before))


def crossings(rows: int, columns: int, rank: int) -> str:
    """From how many tokens on HUT is the cheaper one, by the formulas."""
    both, product = rows + columns, rows * columns
    margin = 3 * rank * both - product
    whole = f"from {3 * product * rank / margin:.0f} tokens on" if margin > 0 else "never"
    return (
        f"[{rows}, {columns}], rank {rank}: cheaper by its own products from {product / both:.0f} tokens on; "
        f"by a whole step {whole} (ranks above {product / (3 * both):.0f})"
    )


def plot(file: Path, found: dict[str, list[dict[str, Any]]]) -> None:
    """HUT's cost over LoRA's against the tokens, on one scale."""
    curves = {"forward": "FLOPs, forward", "step": "FLOPs, step", "seconds": "seconds, step"}
    equal = "fewer FLOPs forward from here on"
    width = drawing.WIDTH
    with drawing.plots(width, 250, len(found), drawing.legend_height([*curves.values(), equal], width)) as (
        canvas,
        several,
    ):
        for axes, (title, rows) in zip(several, found.items(), strict=True):
            if axes is not several[0]:
                axes.sharey(several[0])
            for place, (key, name) in enumerate(curves.items()):
                colour, mark, _ = drawing.look(place)
                ratios = [row[key]["hut"] / row[key]["lora"] for row in rows]
                axes.plot([row["tokens"] for row in rows], ratios, mark, color=colour, linestyle="-", label=name)
            axes.axhline(1, color=drawing.INK, linewidth=0.8)
            crossing = counted_crossing(rows, "forward")
            if crossing is not None:
                axes.axvline(crossing, color=drawing.GREY, linestyle=":", label=equal)
            drawing.powers(axes, 2)
            axes.set_ylim(bottom=0)
            axes.grid(axis="y")
            axes.set_xlabel("tokens of a step")
            axes.set_title(f"HUT over LoRA: {title}")
        drawing.legend(canvas, width)
        drawing.write(canvas, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("model", nargs="?", help="an encoder, such as recipes/quickstart/cache/base")
    parser.add_argument("--shape", nargs=2, type=int, default=[384, 384], metavar=("D", "K"))
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--length", type=int, default=32, help="tokens of a text")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--out", type=Path, help="where all figures go as JSON")
    args = parser.parse_args()
    rows, columns = args.shape
    print(crossings(rows, columns, args.rank))
    title = f"a layer [{rows}, {columns}], rank {args.rank}"
    found = {title: {kind: layer(kind, rows, columns, args.rank) for kind in KINDS}}
    if args.model:
        found[Path(args.model).name] = {kind: model(kind, args.model, args.rank, args.length) for kind in KINDS}
    measured = {title: measure(title, steps, args.tokens, args.repeats) for title, steps in found.items()}
    if args.plot:
        plot(args.plot, measured)
    if args.out:
        args.out.write_text(json.dumps({"shape": args.shape, "rank": args.rank, "rows": measured}, indent=1) + "\n")


if __name__ == "__main__":
    main()
