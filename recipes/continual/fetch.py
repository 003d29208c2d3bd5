"""Fetch two encoders and three sets of labelled data to be learnt in a sequence of tasks.

    pip install -e '.[eval]' onnx
    python recipes/continual/fetch.py

Digits and the image encoder are those of recipes/images, the text encoder is that of recipes/quickstart, fetched by
their scripts where they are not there (187 MB). 137 MB more come from Debian, by apt-get, checked against the hashes
below. A second run does nothing; to fetch anew, delete `cache/`.
"""

import hashlib
import io
import json
import shutil
import sys
import tarfile
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from fetching import download_debian, need, open_debian, run, scratch, sweep  # noqa: E402

need("PIL", extra="'.[eval]' onnx")
from images import fetch as images  # noqa: E402
from PIL import Image, ImageOps  # noqa: E402
from quickstart import fetch as quickstart  # noqa: E402

CACHE = HERE / "cache"
CLIPART = "openclipart-png", "1:0.18+dfsg-19", "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02"
WORDNET = "wordnet-base", "1:3.0-37", "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752"
FOLDERS = (  # of one subject each, with what lies below them
    "animals/birds animals/bugs animals/mammals buildings/homes computer/hardware food/beverages food/desserts "
    "food/fruit office people/smilies people/stickmen plants recreation/music recreation/sports shapes/arrows "
    "signs_and_symbols/flags signs_and_symbols/map_symbols tools transportation/boating transportation/roadsigns"
)
SIDE, LARGEST = 112, 16_000_000  # pixels: of a picture here, of one that is read
MOST = {"pictures": 100, "nouns": 200}  # items of a class
SHARES = {"pictures": (0.3, 0.15), "nouns": (0.2, 0.2)}  # of a class: to test on, to choose on


class Item(NamedTuple):
    """A labelled item. Of those that nothing tells apart, their key being one, only one is taken."""

    id: str
    label: str
    key: str
    content: Image.Image | str
    group: str = ""  # items of one group are of one part


def split(items: Iterable[Item], most: int, shares: tuple[float, float]) -> dict[str, list[Item]]:
    """`most` items per class in three parts, ordered by keys and ids alone; none whose key has two labels."""
    alike = defaultdict(list)
    for item in sorted(items, key=lambda item: (digest(item.key), digest(item.id))):
        alike[item.key].append(item)
    by_label = defaultdict(list)
    for first, *others in alike.values():
        if all(item.label == first.label for item in others):
            by_label[first.label].append(first)
    parts: dict[str, list[Item]] = {"test": [], "validation": [], "train": []}
    for found in by_label.values():
        chosen = sorted(found, key=lambda item: digest(item.group or item.key))[:most]
        test, validation = (round(share * len(chosen)) for share in shares)
        sides: dict[str, str] = {}
        for at, item in enumerate(chosen):
            part = "test" if at < test else "validation" if at < test + validation else "train"
            parts[sides.setdefault(item.group or item.key, part)].append(item)
    return {name: sorted(part, key=lambda item: digest(item.id)) for name, part in parts.items()}


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def read_pictures(archive: tarfile.TarFile, folders: Iterable[str] = FOLDERS.split()) -> Iterator[Item]:
    """Clip art by the innermost of the folders it is in, whole on a white square.

    Alike are two of one look at 16 x 16 points in 16 shades of grey.
    """
    start, inner_first = "./usr/share/openclipart/png/", sorted(folders, key=len, reverse=True)
    for member in archive:
        name = member.name.removeprefix(start).removesuffix(".png")
        label = next((folder for folder in inner_first if name.startswith(folder + "/")), None)
        if label is None or not (member.isfile() and member.name.endswith(".png")):
            continue
        picture = read_picture((archive.extractfile(member) or io.BytesIO()).read())
        if picture is None:
            continue
        small = picture.convert("L").resize((16, 16)).point(lambda value: value // 16)
        yield Item(name.replace("/", "."), label.split("/")[-1], small.tobytes().hex(), picture)


def read_picture(file: bytes) -> Image.Image | None:
    """What is drawn, RGB, SIDE pixels square; None where it is too large, empty or damaged."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(file)) as image:
            if image.width * image.height > LARGEST:  # known before anything is decoded
                return None
            whole = image.convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    box = whole.getchannel("A").getbbox()
    if box is None:  # nothing is drawn
        return None
    whole = whole.crop(box)
    on_white = Image.alpha_composite(Image.new("RGBA", whole.size, "white"), whole).convert("RGB")
    return ImageOps.pad(on_white, (SIDE, SIDE), Image.Resampling.BICUBIC, "white")


def write_images(directory: Path, parts: dict[str, list[Item]]) -> None:
    """The images as PNG, and for each part a JSON-lines file: id, image, label."""
    (directory / "images").mkdir(parents=True)
    for part, items in parts.items():
        for item in items:
            item.content.save(directory / "images" / f"{item.id}.png")
        write(
            directory / f"{part}.jsonl", ({"id": i.id, "image": f"images/{i.id}.png", "label": i.label} for i in items)
        )


def write_nouns(directory: Path, package: Path) -> None:
    """WordNet's definitions, and for each part a JSON-lines file: id, text, label."""
    directory.mkdir()
    items = (Item(one.id, one.label, one.group, one.text) for one in quickstart.read_nouns(package))
    for part, chosen in split(items, MOST["nouns"], SHARES["nouns"]).items():
        write(directory / f"{part}.jsonl", ({"id": i.id, "text": i.content, "label": i.label} for i in chosen))


def write_encoder(directory: Path) -> None:
    """The image encoder for pictures of SIDE pixels: the same weights, another image processor."""
    directory.mkdir()
    source = images.CACHE / "base"
    for name in ("model.safetensors", "config.json"):
        shutil.copyfile(source / name, directory / name)
    square = {"height": SIDE, "width": SIDE}
    processor = images.PROCESSOR | {"size": {"shortest_edge": SIDE}, "crop_size": square}
    (directory / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


def write(file: Path, rows: Iterable[dict[str, str]]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    """Make what is missing in a scratch folder; put it in place by renaming."""
    images.main()
    quickstart.main()
    sweep(CACHE)
    encoder, pictures, nouns = (CACHE / name for name in ("base-112", "pictures", "nouns"))
    if encoder.exists() and pictures.exists() and nouns.exists():
        return print(f"{CACHE}: complete, nothing to fetch")
    with scratch(CACHE) as packages:
        print("fetching about 137 MB from Debian", flush=True)
        wordnet = download_debian(*WORDNET, packages, CACHE)
        clipart = download_debian(*CLIPART, packages, CACHE)
        print("reading the pictures", flush=True)
        write_nouns(packages / "nouns", wordnet)
        with open_debian(clipart) as archive:
            parts = split(read_pictures(archive), MOST["pictures"], SHARES["pictures"])
        write_images(packages / "pictures", parts)
        write_encoder(packages / "base-112")
        for place in (encoder, pictures, nouns):
            if not place.exists():
                (packages / place.name).replace(place)
    print(f"{CACHE}: 20 kinds of pictures, 25 kinds of nouns")


if __name__ == "__main__":
    run(main, "mergebench cil run recipes/continual/miniature.yaml")
