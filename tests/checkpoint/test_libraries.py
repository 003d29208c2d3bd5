"""A merge loads where its inputs did: each kind of model is saved, merged and loaded with its own library.

What the library holds of the merge must be the mean of what it holds of the two, nothing missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mergebench

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
Save = Callable[[nn.Module, Path], object]
Load = Callable[[Path], nn.Module]


def check(tmp_path: Path, model: nn.Module, save: Save, load: Load, shard_size: int = 10**9) -> Path:
    """Save the model and a fine-tune of it, merge the two, load the merge."""
    states = []
    for name in ("a", "b"):
        with torch.no_grad():
            for value in model.parameters():
                value.add_(0.02 * torch.randn(value.shape))
        save(model, tmp_path / name)
        states.append({name: value.clone() for name, value in load(tmp_path / name).state_dict().items()})
    data = {"merge_method": "linear", "models": [{"model": str(tmp_path / name)} for name in "ab"]}
    mergebench.run(mergebench.plan(mergebench.load(data), device="cpu", shard_size=shard_size), tmp_path / "out")
    found = load(tmp_path / "out").state_dict()
    assert found.keys() == states[0].keys() == states[1].keys()
    for name, value in found.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, (states[0][name] + states[1][name]) / 2, msg=name)
    return tmp_path / "out"


def loader(cls: Any, **settings: Any) -> Load:
    """`from_pretrained`, which must miss nothing."""

    def load(place: Path) -> Any:
        model, info = cls.from_pretrained(place, output_loading_info=True, **settings)
        assert {key: value for key, value in info.items() if value} == {}
        return model

    return load


def bert() -> Any:
    from transformers import BertConfig, BertModel

    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertModel(BertConfig(vocab_size=12, max_position_embeddings=20, **size))


@pytest.mark.parametrize("size", ["10GB", "4KB"])
def test_transformers(tmp_path: Path, size: str) -> None:
    model = bert()
    check(tmp_path, model, lambda m, place: m.save_pretrained(place, max_shard_size=size), loader(type(model)))


def test_sentence_transformers(tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.modules import Dense, LayerNorm, Normalize, Pooling, Transformer
    from transformers import BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefg"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    bert().save_pretrained(tmp_path / "bert")
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    modules = [Transformer(str(tmp_path / "bert")), Pooling(16, "mean"), Dense(16, 8), LayerNorm(8), Normalize()]
    model = library.SentenceTransformer(modules=modules, device="cpu")

    def load(place: Path) -> Any:
        return library.SentenceTransformer(str(place), device="cpu")

    out = check(tmp_path, model, lambda m, place: m.save_pretrained(str(place)), load)
    assert [type(one).__name__ for one in load(out)] == [type(one).__name__ for one in modules]
    assert load(out).encode(["a b c"]).shape == (1, 8)


@pytest.mark.parametrize("size", ["10GB", "20KB"])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_diffusers(tmp_path: Path, size: str, variant: str | None) -> None:
    library = pytest.importorskip("diffusers")
    model = library.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
    )

    def save(model: Any, place: Path) -> None:
        model.save_pretrained(place, max_shard_size=size)
        if variant:  # beside the plain file, as on the hub
            model.save_pretrained(place, variant=variant, max_shard_size=size)

    out = check(tmp_path, model, save, loader(type(model)))
    assert "dtype" not in json.loads((out / "config.json").read_text())


def test_open_clip(tmp_path: Path) -> None:
    library = pytest.importorskip("open_clip")
    from safetensors.torch import save_file

    tower = {"width": 64, "layers": 1}
    config = {
        "embed_dim": 16,
        "vision_cfg": {**tower, "image_size": 16, "patch_size": 8},
        "text_cfg": {**tower, "context_length": 8, "vocab_size": 50, "heads": 1},
    }
    model = library.CLIP(**config)

    def save(model: nn.Module, place: Path) -> None:
        place.mkdir()
        save_file(model.state_dict(), place / "open_clip_model.safetensors")
        (place / "open_clip_pytorch_model.bin").write_bytes(b"the same, as a pickle")
        looks = {"mean": [0.5] * 3, "std": [0.5] * 3}
        (place / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": looks}))

    check(tmp_path, model, save, lambda place: library.create_model(f"local-dir:{place}"))


def test_timm(tmp_path: Path) -> None:
    library = pytest.importorskip("timm")
    from timm.models import save_for_hf

    settings = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 3}
    model = library.create_model("vit_tiny_patch16_224", **settings)

    def save(model: nn.Module, place: Path) -> None:
        save_for_hf(model, place, model_args=settings, safe_serialization="both")

    check(tmp_path, model, save, lambda place: library.create_model(f"local-dir:{place}", pretrained=True))
