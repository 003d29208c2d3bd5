"""Images through an encoder equal one image at a time, its pixels prepared by hand."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from mergebench import plugins
from mergebench.errors import MergebenchError, ModelError, RecipeError, RunError
from mergebench.evaluation import Candidate, Record, evaluate_models, load_suite
from tests.evaluation.conftest import HIDDEN, Files, write_encoder, write_head

pytestmark = pytest.mark.usefixtures("one_thread")

COLOURS = ("blue", "green", "red")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
SIZES = {
    "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 12,
    "patch_size": 4, "initializer_range": 0.4,
}  # fmt: skip
FAMILIES: dict[str, Callable[[], Any]] = {
    "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**SIZES)),
    "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SIZES, mlp_ratio=2)),
    "registers": lambda: transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(**SIZES, mlp_ratio=2, num_register_tokens=3)
    ),
    "siglip": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIZES, vision_use_head=False)),
    "convnext": lambda: transformers.ConvNextModel(
        transformers.ConvNextConfig(hidden_sizes=[4, 4, 4, HIDDEN], depths=[1, 1, 1, 1])
    ),
}
IN_FRONT = {"vit": 1, "dinov2": 1, "registers": 4, "siglip": 0}


def write_image_encoder(directory: Path, family: str = "dinov2", **processor: Any) -> Path:
    """A random encoder with an image processor that only scales the colours, where it is not told more."""
    torch.manual_seed(3)
    model = FAMILIES[family]()
    with torch.no_grad():
        for parameter in model.parameters():  # some begin at zero, which would hide that they are lost
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(directory)
    about = {
        "image_processor_type": "BitImageProcessor", "do_convert_rgb": False, "do_resize": False,
        "do_center_crop": False, "image_mean": MEAN, "image_std": STD, **processor,
    }  # fmt: skip
    (directory / "preprocessor_config.json").write_text(json.dumps(about))
    return directory


def write_images(path: Path, count: int, sizes: tuple[int, ...] = (12,), seed: int = 0) -> Path:
    """Noise of the sizes in turn, as PNG and as palette images, beside the data file in `pictures/`."""
    source = random.Random(seed)
    noise = np.random.default_rng(seed)
    (path.parent / "pictures").mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        side, name = sizes[number % len(sizes)], f"pictures/{path.stem}-{number}.png"
        colour = source.choice(COLOURS)
        pixels = noise.integers(0, 128, (side, side, 3))
        pixels[..., -1 - COLOURS.index(colour)] += 100
        image = Image.fromarray(pixels.astype(np.uint8))
        (image.quantize(16) if number % 4 == 0 else image).save(path.parent / name)
        lines.append(json.dumps({"id": number, "image": name, "label": colour}) + "\n")
    path.write_text("".join(lines))
    return path


def pixels_by_hand(file: Path) -> Tensor:
    """[3, height, width]"""
    with Image.open(file) as image:
        values = np.asarray(image.convert("RGB"), np.float64) / 255
    return torch.tensor((values - MEAN) / STD, dtype=torch.float32).permute(2, 0, 1)


def pooled_by_hand(encoder: Path, data: Path, how: str, normalize: bool, in_front: int) -> Tensor:
    """[images, width]: each image alone."""
    model = transformers.AutoModel.from_pretrained(encoder).eval()
    rows = []
    for line in data.read_text().splitlines():
        with torch.no_grad():
            states = model(pixel_values=pixels_by_hand(data.parent / json.loads(line)["image"])[None])[0][0]
        parts = {"cls": states[:1], "mean": states[in_front:].mean(0, keepdim=True)}
        row = torch.cat([parts[part] for part in how.split("+")], 1)
        rows.append(row / row.norm() if normalize else row)
    return torch.cat(rows)


def measure(encoder: Path, entry: dict[str, Any]) -> Record:
    (record,) = evaluate_models([Candidate("m", "base", Files(encoder))], load_suite({"tasks": [entry]})).records
    return record


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with `there/data.jsonl` and `a/head.safetensors`, of a model of width HIDDEN."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    write_images(tmp_path / "there" / "data.jsonl", 23)
    write_head(tmp_path / "a", labels=COLOURS)
    return tmp_path


def task(**changes: Any) -> dict[str, Any]:
    whole = {"kind": "image-classification", "data": "there/data.jsonl", "head": "a/head.safetensors"}
    return {"name": "a", **whole, **changes}


@pytest.mark.parametrize(
    ("family", "how", "normalize"),
    [
        ("vit", "cls", False),
        ("dinov2", "mean", False),
        ("dinov2", "cls+mean", True),
        ("registers", "cls+mean", False),
        ("siglip", "mean", True),
    ],
)
def test_equals_one_image_at_a_time(
    family: str, how: str, normalize: bool, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = write_image_encoder(here / "encoder", family)
    width = HIDDEN * (1 + (how == "cls+mean"))
    head = write_head(here / "a", COLOURS, hidden=width, pooling=how, normalize=str(normalize).lower(), max_length="")
    rows = pooled_by_hand(encoder, here / "there/data.jsonl", how, normalize, IN_FRONT[family])
    tensors = load_file(head)
    answers = [COLOURS[i] for i in (rows @ tensors["weight"].T + tensors["bias"]).argmax(1)]
    assert len(set(answers)) > 1
    labels = [json.loads(line)["label"] for line in (here / "there/data.jsonl").read_text().splitlines()]
    for tokens in (512, 40):  # in a batch: of 9 patches and what stands in front
        monkeypatch.setattr("mergebench.networks.features.CPU_TOKENS", tokens)
        record = measure(encoder, task())
        assert [prediction.output for prediction in record.predictions.values()] == answers
        assert list(record.predictions) == [str(number) for number in range(23)]
        assert record.value == sum(a == b for a, b in zip(answers, labels, strict=True)) / 23


@pytest.mark.parametrize("tokens", [512, 1])
def test_images_of_several_sizes(tokens: int, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mergebench.evaluation.labelled import read_images
    from mergebench.networks.features import Pooling, features
    from mergebench.networks.network import Network

    monkeypatch.setattr("mergebench.networks.features.CPU_TOKENS", tokens)
    encoder = write_image_encoder(here / "encoder")
    data = write_images(here / "there/sizes.jsonl", 7, sizes=(12, 16, 21))
    network = Network(Files(encoder), "AutoModel", torch.device("cpu"))
    ticks: list[int] = []
    found = features(read_images(data, "id", "image", "label").inputs, network, Pooling("cls+mean"), ticks.append)
    torch.testing.assert_close(found, pooled_by_hand(encoder, data, "cls+mean", False, 1), atol=1e-5, rtol=1e-5)
    assert sum(ticks) == 7


def test_the_processor_beside_the_model(here: Path) -> None:
    """What transformers' own processor makes of the images reaches the encoder."""
    about = {"do_resize": True, "size": {"shortest_edge": 18}, "do_center_crop": True, "crop_size": 16, "resample": 3}
    encoder = write_image_encoder(here / "encoder", **about)
    model, processor = transformers.AutoModel.from_pretrained(encoder).eval(), None
    processor = transformers.AutoImageProcessor.from_pretrained(encoder, backend="pil")
    head = load_file(here / "a/head.safetensors")
    answers = []
    for number in range(23):
        image = Image.open(here / f"there/pictures/data-{number}.png").convert("RGB")
        with torch.no_grad():
            states = model(**processor(image, return_tensors="pt")).last_hidden_state[0]
        assert len(states) == 1 + 16
        answers.append(COLOURS[(head["weight"] @ states[1:].mean(0) + head["bias"]).argmax()])
    assert [prediction.output for prediction in measure(encoder, task()).predictions.values()] == answers


def said(encoder: Path, **changes: Any) -> tuple[type[MergebenchError], str, str]:
    with pytest.raises(MergebenchError) as caught:
        measure(encoder, task(**changes))
    return type(caught.value), caught.value.message, caught.value.hint or ""


def test_broken_data(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found before there is a model."""
    nowhere, data = here / "nowhere", here / "there/data.jsonl"
    good = data.read_text()
    picture = here / "there/pictures/data-2.png"

    data.write_text(good.replace("data-2.png", "data-99.png"))
    kind, message, hint = said(nowhere)
    assert (kind, "relative to the data file's folder" in hint) == (RunError, True)
    assert message == "there/data.jsonl:3: there/pictures/data-99.png: No such file or directory"

    data.write_text(good)
    whole = picture.read_bytes()
    for content in (b"", b"GIF", whole[:60], whole[:-30]):
        picture.write_bytes(content)
        kind, message, _ = said(nowhere)
        assert kind is RunError
        assert message.startswith("there/data.jsonl:3: there/pictures/data-2.png is not an image that Pillow reads: ")
        assert "\n" not in message
    picture.write_bytes(whole)

    data.write_text(good.replace('"red"', '"rad"'))
    kind, message, hint = said(nowhere)
    assert (kind, hint) == (RunError, "did you mean 'red'?")
    assert "label 'rad' is none of the labels of a/head.safetensors" in message
    data.write_text(good.replace('"image"', '"file"'))
    assert "no column 'image', it has id, file, label" in said(nowhere)[1]
    data.write_text('{"id": 1, "image": 5, "label": "red"}')
    assert said(nowhere)[1] == "there/data.jsonl:1: image must be text, got 5"

    data.write_text(good)
    assert "no such key" in said(nowhere, max_length=3)[1]

    def absent(library: str) -> str:
        raise plugins.PackageNotFoundError

    monkeypatch.setattr(plugins, "version", absent)
    assert said(nowhere) == (
        RecipeError,
        "images need pillow, which is not installed",
        f"pip install -e '{Path(plugins.__file__).parents[1]}[eval]'",
    )


def test_a_file_that_opens_and_does_not_decode(here: Path) -> None:
    encoder = write_image_encoder(here / "encoder")
    picture = here / "there/pictures/data-2.png"
    Image.effect_noise((12, 12), 50).save(here / "whole.jpg")
    content = (here / "whole.jpg").read_bytes()
    picture.write_bytes(content[: len(content) * 9 // 10])
    kind, message, _ = said(encoder)
    assert kind is RunError
    assert message.startswith("there/pictures/data-2.png: cannot be decoded: ")


def test_models_that_do_not_fit(here: Path) -> None:
    encoder = write_image_encoder(here / "encoder")
    write_head(here / "a", COLOURS, hidden=8)
    kind, message, hint = said(encoder)
    assert (kind, hint) == (ModelError, "a head fits the base it was trained on")
    assert message == f"a/head.safetensors: it takes 8 features, model 'tiny' gives {HIDDEN}"

    write_head(here / "a", COLOURS)
    (encoder / "preprocessor_config.json").rename(encoder / "gone")
    kind, message, _ = said(encoder)
    assert (kind, message) == (ModelError, f"model 'tiny': no preprocessor_config.json in {encoder}")
    (encoder / "preprocessor_config.json").write_text("{")
    assert "cannot read its preprocessor_config.json" in said(encoder)[1]
    (encoder / "preprocessor_config.json").write_text('{"image_processor_type": "Nothing"}')
    assert "cannot read its preprocessor_config.json" in said(encoder)[1]

    write_head(here / "a", COLOURS, pooling="cls")
    kind, message, hint = said(write_image_encoder(here / "siglip", "siglip"))
    assert (message, hint) == ("model 'tiny': it has no class token", "pooling: mean")
    kind, message, _ = said(write_image_encoder(here / "convnext", "convnext"))
    assert kind is ModelError

    vit = write_image_encoder(here / "vit", "vit")
    write_images(here / "there/data.jsonl", 3, sizes=(16,))
    kind, message, _ = said(vit)
    assert kind is ModelError
    assert message.startswith("model 'tiny': it takes no images of 3x16x16: ")

    text = write_encoder(here / "text")
    shutil.copy(vit / "preprocessor_config.json", text)
    kind, message, _ = said(text)
    assert kind is ModelError
    assert "no patch_size" in message


def test_other_images_are_other_results(here: Path) -> None:
    """The same paths with other pictures behind them: known for another item, kept as another result."""
    (first,) = load_suite({"tasks": [task()]}).tasks
    write_images(here / "there/data.jsonl", 23, seed=5)
    (second,) = load_suite({"tasks": [task()]}).tasks
    assert first.ready.versions["images"] != second.ready.versions["images"]
    assert not first.ready.items.keys() & second.ready.items.keys()
