"""Average the checkpoints of one training with a constant learning rate, beside one whose rate decays.

    python recipes/quickstart/fetch.py && python recipes/systems/fetch.py
    OMP_NUM_THREADS=1 python benchmarks/averaging.py FOLDER --seeds 0 1 2

MiniLM, all its weights, with a linear head on the mean of its tokens, learns the 25 sections of WordNet's nouns from
their glosses: 480 steps of 16, every gloss read once, AdamW, and from step 48 on a constant learning rate. A checkpoint
is kept every 20 steps from 240 on. The decayed run is the same up to step 320; from there its rate falls linearly to
zero at step 480, on the same batches. The recipes below average the checkpoints. Loss and accuracy are on 1,000 glosses
that no run has read; differences are paired, with their standard error over the glosses of all seeds.

Prints Markdown. Checkpoints and measurements are kept in FOLDER, so that a run that was killed goes on; take another
folder when the code has changed. About 25 minutes of one core for three seeds, and 4 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModel, AutoTokenizer

import mergebench

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
sys.path.insert(0, str(RECIPES / "quickstart"))
from fetch import read_nouns  # noqa: E402

BASE = RECIPES / "quickstart" / "cache" / "base"
DATA = RECIPES / "systems" / "cache"
STEPS, WARM_UP, BATCH, MAX_LENGTH = 480, 48, 16, 32
KEPT_FROM, EVERY, DECAY_FROM = 240, 20, 320
TESTED = 1000
LR, HEAD_LR = 3e-4, 3e-3
SCHEDULES: dict[str, Any] = {
    "mean": "mean",
    "ema, decay 0.8": "ema",
    "wsm, cosine": "wsm",
    "minus-sqrt": "minus-sqrt",
}
WINDOWS = {400: ["mean"], 320: list(SCHEDULES), 240: ["mean"]}  # the first step, to the last of the run


Measured = tuple[list[float], list[int]]


class Classifier(nn.Module):
    """The encoder and a linear head on the mean of its last states."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.encoder = AutoModel.from_pretrained(BASE)
        self.head = nn.Linear(self.encoder.config.hidden_size, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        states = self.encoder(ids, attention_mask=mask).last_hidden_state
        return self.head((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


class Texts:
    """Token ids and class numbers."""

    def __init__(self, rows: Sequence[tuple[str, str]], labels: Sequence[str]) -> None:
        tokenizer = AutoTokenizer.from_pretrained(BASE)
        self.ids = tokenizer([text for text, _ in rows], truncation=True, max_length=MAX_LENGTH)["input_ids"]
        self.labels = torch.tensor([labels.index(label) for _, label in rows])

    def batch(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, mask and labels."""
        longest = max(len(self.ids[number]) for number in numbers)
        ids, mask = torch.zeros(len(numbers), longest, dtype=torch.long), torch.zeros(len(numbers), longest)
        for row, number in enumerate(numbers):
            ids[row, : len(self.ids[number])] = torch.tensor(self.ids[number])
            mask[row, : len(self.ids[number])] = 1
        return ids, mask, self.labels[list(numbers)]


def data() -> tuple[Texts, Texts, int]:
    """What is trained on, what is tested on, and the number of classes."""
    test = [json.loads(line) for line in (DATA / "nouns-test.jsonl").read_text().splitlines()]
    rows = [(one["text"], one["label"]) for one in test[:TESTED]]
    tested = {one["text"] for one in test}
    every = {one.text: one.label for one in read_nouns(next(DATA.glob("wordnet-base_*.deb")))}
    others = sorted((text, label) for text, label in every.items() if text not in tested)
    labels = sorted({label for _, label in others})
    random.Random(0).shuffle(others)
    return Texts(others[: 3 * STEPS * BATCH], labels), Texts(rows, labels), len(labels)


def rate(step: int, decays: bool) -> float:
    """The factor on the learning rate of a step, counted from 1."""
    if decays and step > DECAY_FROM:
        return (STEPS - step + 1) / (STEPS - DECAY_FROM + 1)
    return min(step / WARM_UP, 1.0)


def train(folder: Path, seed: int, texts: Texts, classes: int) -> None:
    """The run with a constant rate, its checkpoints and, branched off, the one that decays."""
    torch.manual_seed(seed)
    order = list(range(len(texts.ids)))
    random.Random(seed).shuffle(order)
    model = Classifier(classes)
    groups = [
        {"params": list(model.encoder.parameters()), "lr": LR},
        {"params": list(model.head.parameters()), "lr": HEAD_LR},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    branch: tuple[Any, Any] | None = None

    def run(first: int, decays: bool) -> Iterator[int]:
        torch.manual_seed(1000 * seed + first)  # of the dropout
        for step in range(first, STEPS + 1):
            for group, lr in zip(optimizer.param_groups, (LR, HEAD_LR), strict=True):
                group["lr"] = lr * rate(step, decays)
            ids, mask, labels = texts.batch(order[(step - 1) * BATCH : step * BATCH])
            loss = cross_entropy(model(ids, mask), labels)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            yield step

    model.train()
    for step in run(1, decays=False):
        if step == DECAY_FROM:
            state, moments = model.state_dict(), optimizer.state_dict()
            branch = {name: one.clone() for name, one in state.items()}, _copied(moments)
        if step >= KEPT_FROM and step % EVERY == 0:
            keep(model, folder / f"checkpoint-{step}")
    assert branch is not None
    model.load_state_dict(branch[0])
    optimizer.load_state_dict(branch[1])
    for _ in run(DECAY_FROM + 1, decays=True):
        pass
    keep(model, folder / "decayed")


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(one) for key, one in value.items()}
    return [_copied(one) for one in value] if isinstance(value, list) else value


def keep(model: Classifier, place: Path) -> None:
    """A directory that is complete when it appears."""
    part = place.with_name(f".{place.name}")
    part.mkdir(parents=True, exist_ok=True)
    model.encoder.config.save_pretrained(part)
    save_file({name: one.contiguous() for name, one in model.state_dict().items()}, part / "model.safetensors")
    part.rename(place)


@torch.inference_mode()
def measure(place: Path, texts: Texts, classes: int) -> Measured:
    """Each text's loss in nats, and whether it is classified right."""
    model = Classifier(classes).eval()
    model.load_state_dict(load_file(place / "model.safetensors"))
    losses: list[float] = []
    right: list[int] = []
    order = sorted(range(len(texts.ids)), key=lambda number: len(texts.ids[number]))
    for at in range(0, len(order), 64):
        ids, mask, labels = texts.batch(order[at : at + 64])
        logits = model(ids, mask)
        losses += cross_entropy(logits, labels, reduction="none").tolist()
        right += (logits.argmax(1) == labels).int().tolist()
    return losses, right


def averaged(folder: Path, first: int, schedule: Any) -> Path:
    """The average of the checkpoints from a step to the last."""
    out = folder / f"average-{first}-{schedule}"
    recipe = {
        "merge_method": "linear",
        "models": f"{folder}/checkpoint-{{{first}..{STEPS}..{EVERY}}}",
        "schedule": schedule,
    }
    mergebench.merge(recipe, out, overwrite=True)
    return out


def figures(folder: Path, texts: Texts, classes: int) -> dict[str, Measured]:
    """What one seed gave, each measured once."""
    kept = folder / "measured.json"
    found: dict[str, Measured] = json.loads(kept.read_text()) if kept.is_file() else {}
    rows = {"last checkpoint": folder / f"checkpoint-{STEPS}", "decayed run": folder / "decayed"}
    for first, names in WINDOWS.items():
        count = (STEPS - first) // EVERY + 1
        for name in names:
            label = f"{count} checkpoints from {first}, {name}"
            rows[label] = folder / label if label in found else averaged(folder, first, SCHEDULES[name])
    for label, place in rows.items():
        if label not in found:
            found[label] = measure(place, texts, classes)
            kept.write_text(json.dumps(found))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--train-only", action="store_true")
    given = parser.parse_args()
    texts, test, classes = data()
    seeds = []
    for seed in given.seeds:
        folder = given.folder / f"seed-{seed}"
        if not (folder / "decayed").is_dir():
            train(folder, seed, texts, classes)
        if not given.train_only:
            seeds.append(figures(folder, test, classes))
    if not seeds:
        return
    print("| what | loss | accuracy | loss - last checkpoint's | loss - decayed run's |\n|---|---|---|---|---|")
    for label in seeds[0]:
        losses, rights = ([value for one in seeds for value in one[label][k]] for k in (0, 1))
        row = [f"{statistics.fmean(losses):.3f}", f"{statistics.fmean(rights):.3f}"]
        for other in ("last checkpoint", "decayed run"):
            theirs = [value for one in seeds for value in one[other][0]]
            row.append(said([loss - their for loss, their in zip(losses, theirs, strict=True)]))
        print(f"| {label} | {' | '.join(row)} |")


def said(differences: Sequence[float]) -> str:
    """The mean over the texts, with its standard error."""
    mean, error = statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(len(differences))
    return "" if error == 0 else f"{mean:+.3f} ± {error:.3f}"


if __name__ == "__main__":
    main()
