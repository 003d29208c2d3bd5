"""What a candidate merge of the quickstart costs, as a multiple of the forward passes of its data alone.

    python recipes/quickstart/fetch.py
    python benchmarks/evaluation.py [--candidates 12] [--split test]

A candidate is planned, merged in memory, put in the place of the one before it and measured on the suite's four
tasks (1200 texts), as `mergebench search` does it. The forward pass is the encoder alone on the same tokens in the
same batches, with the weights that are there. The two take turns, so that both meet the same machine.
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
from mergebench.evaluation.batch import CPU_TOKENS, batches, run_batches
from mergebench.evaluation.head import read_head
from mergebench.evaluation.network import Network
from mergebench.evaluation.run import Batch
from mergebench.evaluation.suite import Suite
from mergebench.searching.candidates import Candidates

ROOT = Path(__file__).resolve().parents[1]
CASES = {  # what changes from one candidate to the next
    "pcb, lambda": ("pcb", "parameters.lambda", 0.6, 1.4),
    "pcb, density": ("pcb", "parameters.density", 0.05, 0.4),
    "ties, lambda": ("ties", "parameters.lambda", 0.6, 1.4),
    "ties, density": ("ties", "parameters.density", 0.05, 0.4),
    "task_arithmetic, lambda": ("task_arithmetic", "parameters.lambda", 0.2, 0.6),
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
    print("| what changes | a candidate, s | forward passes, s | ratio | the first candidate, s |")
    print("|---|---|---|---|---|")
    for name, (method, path, low, high) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            candidates, batch = Candidates(Path(folder), "cpu"), Batch(suite, "cpu", None)
            spent, passes = [], []
            for number in range(options.candidates + 1):
                value = low + (high - low) * number / options.candidates
                changes = [f"merge_method={method}", f"{path}={value}"]
                start = time.perf_counter()
                recipe = mergebench.load(ROOT / "recipes/quickstart.yaml", changes)
                plan = candidates.plan(recipe)
                model = candidates.merge(plan, str(number))
                batch.measure(Candidate(str(number), "merged", model))
                spent.append(time.perf_counter() - start)
                assert batch._network is not None
                tokens = [batch._network.tokenize(part, length) for part, length in texts]
                passes.append(forward(batch._network, tokens))
            first, *spent = spent  # it makes what the others use again
            mean, alone = sum(spent) / len(spent), sum(passes[1:]) / len(spent)
            print(f"| {name} | {mean:.2f} | {alone:.2f} | {mean / alone:.2f} | {first:.2f} |", flush=True)


if __name__ == "__main__":
    main()
