"""What a candidate merge of the quickstart costs, as a multiple of the forward passes of its data alone.

    python recipes/quickstart/fetch.py
    python benchmarks/evaluation.py [--candidates 12] [--split test]

A candidate is planned and merged in memory, then put in the place of the one before it and measured on the suite's
four tasks (1200 texts), as `mergebench search` does it. The forward pass is the encoder alone on the same tokens in
the same batches, with the weights that are there. The two take turns, so that both meet the same machine. The first
candidate is left out: it finds what the others use again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from speed import commit

import mergebench
from mergebench.evaluation import Candidate, load_suite
from mergebench.evaluation.batch import Batch
from mergebench.evaluation.head import read_head
from mergebench.evaluation.search.candidates import Candidates
from mergebench.evaluation.suite import Suite
from mergebench.networks.batch import CPU_TOKENS, batches, run_batches
from mergebench.networks.network import Network

ROOT = Path(__file__).resolve().parents[1]
CASES = {  # what changes from one candidate to the next
    "pcb, lambda": ("pcb", "lambda", 0.6, 1.4),
    "pcb, density": ("pcb", "density", 0.05, 0.4),
    "ties, lambda": ("ties", "lambda", 0.6, 1.4),
    "ties, density": ("ties", "density", 0.05, 0.4),
    "task_arithmetic, lambda": ("task_arithmetic", "lambda", 0.2, 0.6),
}


def texts_of(suite: Suite) -> list[tuple[list[str], int]]:
    """Each task's texts, and the tokens they are cut to."""
    found = []
    for task in suite.tasks:
        lines = task.params.data.read_bytes().splitlines()[: task.params.limit]
        head = read_head(task.params.head)
        found.append(([json.loads(line)["text"] for line in lines], head.max_length))
    return found


def forward(network: Network, tokens: list[list[list[int]]]) -> float:
    """Seconds of the encoder alone on all texts."""

    def work(group: list[int]) -> None:
        with torch.inference_mode():
            network.encode([part[i] for i in group])

    start = time.perf_counter()
    for part in tokens:
        run_batches(work, batches([len(one) for one in part], CPU_TOKENS), network.device, lambda _: None)
    return time.perf_counter() - start


def main() -> None:
    """Measure and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=12)
    parser.add_argument("--split", default="test", choices=["test", "validation"])
    options = parser.parse_args()
    suite = load_suite(ROOT / "recipes/quickstart/suite.yaml").only(options.split)
    texts = texts_of(suite)
    print(f"commit {commit()}; {options.candidates} candidates, {suite.items} texts\n")
    print("| what changes | merged in, s | evaluated in, s | forward passes, s | evaluated / passes | both / passes |")
    print("|---|---|---|---|---|---|")
    for name, (method, parameter, low, high) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            candidates, batch = Candidates(Path(folder), "cpu"), Batch(suite, "cpu", None)
            spent = []
            for number in range(options.candidates + 1):
                value = low + (high - low) * number / options.candidates
                changes = [f"merge_method={method}", f"parameters={{{parameter}: {value}}}"]
                start = time.perf_counter()
                recipe = mergebench.load(ROOT / "recipes/quickstart.yaml", changes)
                model = candidates.merge(candidates.plan(recipe), str(number))
                merged = time.perf_counter()
                batch.measure(Candidate(str(number), "merged", model))
                measured = time.perf_counter()
                assert batch._network is not None
                tokens = [batch._network.tokenize(part, length) for part, length in texts]
                spent.append((merged - start, measured - merged, forward(batch._network, tokens)))
            merge, measure, passes = (sum(column) / options.candidates for column in zip(*spent[1:], strict=True))
            ratios = f"{measure / passes:.2f} | {(merge + measure) / passes:.2f}"
            print(f"| {name} | {merge:.2f} | {measure:.2f} | {passes:.2f} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
