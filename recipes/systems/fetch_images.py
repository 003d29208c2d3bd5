"""Fetch seven tasks of images and an encoder to fine-tune on them.

    pip install -e '.[eval]' onnx
    python recipes/systems/fetch_images.py

The encoder and the handwritten digits are those of recipes/images, fetched by its script where they are not there
(92 MB). 131 MB of clip art come from Debian, by apt-get; 1,797 small digits lie in scikit-learn. A second run does
nothing; to fetch anew, delete `cache/images`. An image of two tasks is in the same part of both.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from fetching import download_debian, need, open_debian, run, scratch, sweep  # noqa: E402

need("numpy", "PIL", "sklearn", extra="'.[eval]' onnx")
import numpy as np  # noqa: E402
from continual import fetch as continual  # noqa: E402
from images import fetch as images  # noqa: E402
from PIL import Image  # noqa: E402
from sklearn.datasets import load_digits  # noqa: E402

CACHE = HERE / "cache"
MOST = {"train": 2048, "validation": 300, "test": 1000}  # items of a part
THEMES = {  # each a task; a folder with what lies below it, but for the folders that are named too
    "living": "animals animals/birds animals/bugs animals/mammals food food/beverages food/desserts food/fruit people "
    "plants",
    "things": "buildings computer computer/hardware education office people/clothing recreation/music "
    "recreation/sports tools transportation",
    "signs": "computer/buttons computer/icons computer/icons/etiquette-theme computer/icons/flat-theme/action "
    "computer/icons/flat-theme/applications computer/icons/lemon-theme/actions computer/icons/lemon-theme/apps "
    "computer/icons/lemon-theme/filesystems computer/icons/lemon-theme/mimetypes geography signs_and_symbols "
    "signs_and_symbols/flags signs_and_symbols/flags/africa signs_and_symbols/flags/america "
    "signs_and_symbols/flags/asia signs_and_symbols/flags/europe signs_and_symbols/map_symbols special/patterns "
    "transportation/roadsigns",
}
OF_A_FOLDER, SHARES = 140, (0.38, 0.15)  # pictures; to test on, to choose on
SMALL_DIGITS_SHARES = 1 / 3, 1 / 6
VARIANT = re.compile(r"(?<![a-z])(bw|black|white|gr[ae]y|red|green|blue|yellow|orange|purple|seagreen)(?![a-z])|[^a-z]")
SYMMETRIC = 12  # shades of 256 by which a picture differs, on average, from itself turned

Parts = dict[str, list[continual.Item]]


def read_digits() -> Parts:
    """The handwritten digits of recipes/images, in its parts."""
    parts: Parts = {}
    for part in MOST:
        lines = (images.CACHE / "digits" / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
        parts[part] = []
        for row in map(json.loads, lines):
            with Image.open(images.CACHE / "digits" / row["image"]) as image:
                parts[part].append(continual.Item(row["id"], row["label"], "", image.copy()))
    return parts


def read_small_digits() -> Iterator[continual.Item]:
    """Handwritten digits of 8 x 8 points; the encoder's image processor scales them up."""
    pixels, labels = load_digits(return_X_y=True)
    for number, (row, label) in enumerate(zip(pixels, labels, strict=True)):
        image = Image.fromarray((row.reshape(8, 8) * 255 / 16).astype(np.uint8))
        yield continual.Item(f"small-digit-{number}", str(label), image.tobytes().hex(), image)


def series(name: str) -> str:
    """The folder, and ten letters that pictures of a series begin with whatever their numbers and colours."""
    folder, _, stem = name.rpartition(".")
    return f"{folder}.{VARIANT.sub('', stem.lower())[:10]}"


def read_clipart(package: Path) -> Parts:
    """The pictures of all themes. Of those that look alike one is taken; a series is in one part."""
    with open_debian(package) as archive:
        items = list(continual.read_pictures(archive, " ".join(THEMES.values()).split()))
    return continual.split((item._replace(group=series(item.id)) for item in items), OF_A_FOLDER, SHARES)


def turned(parts: Parts) -> Parts:
    """Each image once, turned counter-clockwise by the degrees that are its label. Symmetric ones are left out."""
    result: Parts = {part: [] for part in parts}
    for part, items in parts.items():
        for item in items:
            look = np.asarray(item.content.convert("L").resize((16, 16)), float)
            if min(abs(look - np.rot90(look, turns)).mean() for turns in (1, 2)) >= SYMMETRIC:
                degrees = 90 * (int(continual.digest(f"turn {item.id}"), 16) % 4)
                result[part].append(item._replace(label=str(degrees), content=item.content.rotate(degrees)))
    return result


def main() -> None:
    """Make the tasks in a scratch folder; put them in place by renaming."""
    images.main()
    sweep(CACHE)
    place = CACHE / "images"
    if place.exists():
        return print(f"{place}: complete, nothing to fetch")
    with scratch(CACHE) as packages:
        print("fetching about 131 MB from Debian", flush=True)
        package = download_debian(*continual.CLIPART, packages, CACHE)
        print("reading the pictures", flush=True)
        digits, clipart = read_digits(), read_clipart(package)
        tasks = {"digits": digits, "turned-digits": turned(digits), "turned-clip-art": turned(clipart)}
        tasks["small-digits"] = continual.split(read_small_digits(), sys.maxsize, SMALL_DIGITS_SHARES)
        for theme, folders in THEMES.items():
            labels = {folder.split("/")[-1] for folder in folders.split()}
            tasks[theme] = {part: [item for item in items if item.label in labels] for part, items in clipart.items()}
        for task, parts in tasks.items():
            continual.write_images(
                packages / "images" / task, {part: items[: MOST[part]] for part, items in parts.items()}
            )
        (packages / "images").replace(place)
    print(f"{place}: {', '.join(tasks)}")


if __name__ == "__main__":
    run(main, "mergebench train benchmarks/systems/full_images.yaml --out trained/full_images")
