"""What mergebench writes, transformers loads: the right keys, the right values, the right types, still tied.

Every architecture is a tiny random model, saved by transformers; fine-tunes are the same moved a little,
one of them stored in another layout of shards.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import INDEX, SINGLE, names, read_model, write_model, write_recipe
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
)

import mergebench
from mergebench.errors import MergebenchError

SIZES = {"vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = SIZES | {"intermediate_size": 24, "num_key_value_heads": 1, "max_position_embeddings": 32}
VISION = {key: value for key, value in SIZES.items() if key != "vocab_size"} | {
    "intermediate_size": 24, "image_size": 8, "patch_size": 4
}  # fmt: skip
TEXT = SIZES | {"intermediate_size": 24, "max_position_embeddings": 16, "eos_token_id": 47}

ARCHITECTURES: dict[str, tuple[Any, Any]] = {
    "llama": (AutoModelForCausalLM, lambda: transformers.LlamaConfig(**LLAMA)),
    "llama-tied": (AutoModelForCausalLM, lambda: transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "bert": (AutoModel, lambda: transformers.BertConfig(**SIZES, intermediate_size=24, max_position_embeddings=16)),
    "bert-mlm": (
        AutoModelForMaskedLM,
        lambda: transformers.BertConfig(**SIZES, intermediate_size=24, max_position_embeddings=16),
    ),
    "t5": (
        AutoModelForSeq2SeqLM,
        lambda: transformers.T5Config(
            vocab_size=48, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
        ),
    ),
    "vit": (AutoModelForImageClassification, lambda: transformers.ViTConfig(**VISION)),
    "clip": (
        AutoModel,
        lambda: transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=12),
    ),
    "gpt2": (
        AutoModelForCausalLM,
        lambda: transformers.GPT2Config(vocab_size=48, n_positions=16, n_embd=16, n_layer=2, n_head=2),
    ),
    "mixtral": (AutoModelForCausalLM, lambda: transformers.MixtralConfig(**LLAMA, num_local_experts=4)),
    "qwen2-moe": (
        AutoModelForCausalLM,
        lambda: transformers.Qwen2MoeConfig(
            **LLAMA, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, shared_expert_intermediate_size=12
        ),
    ),
}


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    """No bars in the test's output."""
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, torch.dtype], Path]:
    """A directory with base, ft1 and ft2 of an architecture, made once."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def get(name: str, dtype: torch.dtype) -> Path:
        if (name, dtype) not in made:
            made[name, dtype] = _make(tmp_path_factory.mktemp(name), *ARCHITECTURES[name], dtype)
        return made[name, dtype]

    return get


def _make(folder: Path, auto: Any, config: Callable[[], Any], dtype: torch.dtype) -> Path:
    torch.manual_seed(0)
    model = auto.from_config(config()).to(dtype)
    model.save_pretrained(folder / "base")
    origin = {name: value.clone() for name, value in model.named_parameters()}
    for number, limit in ((1, "3KB"), (2, "8KB")):
        with torch.no_grad():
            for name, value in model.named_parameters():  # a tied one is listed once
                value.copy_(origin[name] + 0.02 * torch.randn_like(value))
        model.save_pretrained(folder / f"ft{number}", max_shard_size=limit)
    assert not (folder / "base" / INDEX).exists() and (folder / "ft1" / INDEX).exists()
    return folder


def merge(folder: Path, method: str, out: Path, **how: Any) -> Path:
    names = ["ft1", "ft2"] if method == "ties" else ["base", "ft1", "ft2"]
    recipe: dict[str, Any] = {"merge_method": method, "models": [{"model": str(folder / name)} for name in names]}
    if method == "ties":
        recipe |= {"base_model": str(folder / "base"), "parameters": {"density": 0.4}}
    recipe |= how.pop("recipe", {})
    plan = mergebench.plan(mergebench.load(recipe), device="cpu", workers=2, **how)
    return mergebench.run(plan, out, verify=True).out


def brute_force(folder: Path, method: str) -> dict[str, Tensor]:
    """The merge of every tensor on disk, in plain torch."""
    base, first, second = (read_model(folder / name) for name in ("base", "ft1", "ft2"))
    assert base.keys() == first.keys() == second.keys()
    return {name: _merged(method, *(model[name].float() for model in (base, first, second))) for name in base}


def _merged(method: str, base: Tensor, *models: Tensor) -> Tensor:
    if method == "linear":
        return (base + models[0] + models[1]) / 3
    kept = []
    for model in models:
        difference = model - base
        count = max(int(difference.numel() * 0.4), 1)
        threshold = difference.abs().flatten().sort(descending=True).values[count - 1]
        kept.append(torch.where(difference.abs() >= threshold, difference, 0))
    sign = torch.where(sum(kept) >= 0, 1.0, -1.0)
    agree = [torch.where(one * sign > 0, one, 0) for one in kept]
    number = sum((one != 0).float() for one in agree)
    return base + sum(agree) / torch.clamp(number, min=1)


def load(auto: Any, out: Path) -> Any:
    """The model as a user loads it; nothing may be missing, unexpected or of another shape."""
    model, info = auto.from_pretrained(out, output_loading_info=True)
    assert {key: sorted(value) for key, value in info.items() if value} == {}
    return model


def assert_close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    assert found.keys() == expected.keys()
    step = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    for name, value in found.items():
        assert value.dtype == dtype, name
        # half an ulp for the rounding, the rest for float32 arithmetic in another order
        torch.testing.assert_close(
            value.float(), expected[name], rtol=step, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


# -- keys and values ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["linear", "ties"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loads_with_the_right_values(zoo: Any, tmp_path: Path, name: str, dtype: torch.dtype, method: str) -> None:
    folder, auto = zoo(name, dtype), ARCHITECTURES[name][0]
    out = merge(folder, method, tmp_path / "out", shard_size=5000)
    expected = brute_force(folder, method)
    assert_close(read_model(out), expected, dtype)
    model = load(auto, out)
    assert next(model.parameters()).dtype == dtype
    model.save_pretrained(tmp_path / "again")  # back from memory's names to the files'
    assert_close(read_model(tmp_path / "again"), expected, dtype)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_average_of_the_loaded_models(zoo: Any, tmp_path: Path, name: str) -> None:
    """Averaged in memory, under memory's names (fused experts, tied heads): the same model."""
    folder, auto = zoo(name, torch.float32), ARCHITECTURES[name][0]
    merged = load(auto, merge(folder, "linear", tmp_path / "out")).state_dict()
    models = [auto.from_pretrained(folder / one).state_dict() for one in ("base", "ft1", "ft2")]
    assert merged.keys() == models[0].keys()
    for key, value in merged.items():
        torch.testing.assert_close(value, sum(model[key] for model in models) / 3, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("name", ["llama-tied", "bert-mlm", "t5", "gpt2"])
def test_tied_weights_stay_tied(zoo: Any, tmp_path: Path, name: str) -> None:
    out = merge(zoo(name, torch.float32), "ties", tmp_path / "out")
    model = load(ARCHITECTURES[name][0], out)
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert head is embedding or head.data_ptr() == embedding.data_ptr()
    assert not [key for key in read_model(out) if key.endswith(("lm_head.weight", "decoder.weight"))]


@pytest.mark.parametrize("method", ["linear", "ties", "dare_linear", "slerp"])
def test_tied_weights_stored_twice_stay_equal(zoo: Any, tmp_path: Path, method: str) -> None:
    """Some tools store the head beside the embedding it is tied to: the two must come out the same."""
    for model in ("base", "ft1", "ft2"):
        tensors = read_model(zoo("llama-tied", torch.float32) / model)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        config = json.loads((zoo("llama-tied", torch.float32) / model / "config.json").read_text())
        write_model(tmp_path / model, tensors, config=config)
    recipe: dict[str, Any] = {}
    if method == "dare_linear":
        recipe = {"base_model": str(tmp_path / "base"), "parameters": {"density": 0.5}}
    if method == "slerp":
        models = [{"model": str(tmp_path / name)} for name in ("ft1", "ft2")]
        recipe = {"models": models, "parameters": {"t": 0.5}}
    out = merge(tmp_path, method, tmp_path / "out", recipe=recipe)
    merged = read_model(out)
    assert torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])
    model = load(AutoModelForCausalLM, out)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_the_outputs_of_the_loaded_model(zoo: Any, tmp_path: Path) -> None:
    """A model merged with itself computes what it did."""
    folder = zoo("mixtral", torch.float32)
    same = [{"model": str(folder / "ft1")}] * 2
    out = merge(folder, "linear", tmp_path / "out", recipe={"models": same})
    tokens = torch.arange(10).reshape(1, 10)
    before, after = (AutoModelForCausalLM.from_pretrained(place).eval() for place in (folder / "ft1", out))
    with torch.inference_mode():
        assert torch.equal(before(tokens).logits, after(tokens).logits)


# -- types and config --------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["dtype", "torch_dtype", None])
@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
def test_the_config_names_the_stored_type(zoo: Any, tmp_path: Path, stored: str, key: str | None) -> None:
    """Nothing else in it changes; the key of transformers 4 keeps its name."""
    folder = tmp_path / "models"
    shutil.copytree(zoo("llama", torch.float32), folder)
    config = json.loads((folder / "base" / "config.json").read_text())
    assert config.pop("dtype") == "float32"
    before = config | ({key: "float32"} if key else {})
    (folder / "base" / "config.json").write_text(json.dumps(before))
    out = merge(folder, "linear", tmp_path / "out", recipe={"out_dtype": stored})
    after = json.loads((out / "config.json").read_text())
    assert after == before | {key or "dtype": stored}
    dtype = getattr(torch, stored)
    assert {value.dtype for value in read_model(out).values()} == {dtype}
    assert next(load(AutoModelForCausalLM, out).parameters()).dtype == dtype
    assert_close(read_model(out), brute_force(folder, "linear"), dtype)


def test_out_dtype_goes_before_dtype(zoo: Any, tmp_path: Path) -> None:
    recipe = {"dtype": "float16", "out_dtype": "bfloat16"}
    out = merge(zoo("llama", torch.float32), "linear", tmp_path / "out", recipe=recipe)
    assert {value.dtype for value in read_model(out).values()} == {torch.bfloat16}


def test_each_tensor_keeps_its_own_type(zoo: Any, tmp_path: Path) -> None:
    """A base of two types: the result has both, and the config is left as it is."""
    folder = tmp_path / "models"
    shutil.copytree(zoo("llama", torch.bfloat16), folder)
    tensors = read_model(folder / "base")
    norms = {name: value.float() if "norm" in name else value for name, value in tensors.items()}
    save_file(norms, folder / "base" / SINGLE)
    before = (folder / "base" / "config.json").read_bytes()
    out = merge(folder, "linear", tmp_path / "out")
    assert {name: value.dtype for name, value in read_model(out).items()} == {n: v.dtype for n, v in norms.items()}
    assert (out / "config.json").read_bytes() == before


def test_float64_inputs(zoo: Any, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    for name in ("base", "ft1", "ft2"):
        tensors = {key: value.double() for key, value in read_model(zoo("gpt2", torch.float32) / name).items()}
        config = json.loads((zoo("gpt2", torch.float32) / name / "config.json").read_text())
        write_model(folder / name, tensors, config=config)
    out = merge(folder, "linear", tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["dtype"] == "float64"
    assert {value.dtype for value in read_model(out).values()} == {torch.float64}
    expected = brute_force(folder, "linear")
    for name, value in read_model(out).items():
        torch.testing.assert_close(value.float(), expected[name], rtol=2e-6, atol=2e-7)
    half = merge(folder, "linear", tmp_path / "half", recipe={"dtype": "float16"})
    assert_close(read_model(half), expected, torch.float16)


def test_integer_buffers_are_copied(zoo: Any, tmp_path: Path) -> None:
    """Older files hold position_ids; a counter of steps is never averaged."""
    folder = tmp_path / "models"
    shutil.copytree(zoo("bert", torch.float32), folder)
    for name, steps in (("base", 3), ("ft1", 5)):
        tensors = read_model(folder / name)
        shutil.rmtree(folder / name)
        extra = {"embeddings.position_ids": torch.arange(16).reshape(1, 16), "steps": torch.tensor(steps)}
        write_model(folder / name, tensors | extra, config=json.loads(_config(zoo, "bert")))
    tensors = read_model(folder / "ft2")
    shutil.rmtree(folder / "ft2")
    write_model(folder / "ft2", tensors | {"steps": torch.tensor(7)}, config=json.loads(_config(zoo, "bert")))
    plan = mergebench.plan(mergebench.load({"merge_method": "linear", "models": _models(folder)}))
    merged = read_model(mergebench.run(plan, tmp_path / "out").out)
    assert torch.equal(merged["steps"], torch.tensor(3))
    assert torch.equal(merged["embeddings.position_ids"], torch.arange(16).reshape(1, 16))


def _config(zoo: Any, name: str) -> str:
    return str((zoo(name, torch.float32) / "base" / "config.json").read_text())


def _models(folder: Path) -> list[dict[str, str]]:
    return [{"model": str(folder / name)} for name in ("base", "ft1", "ft2")]


# -- files -------------------------------------------------------------------------------------------

COPIED = {
    "tokenizer.json": b'{"version": "1.0"}\r\n',
    "tokenizer_config.json": b'{"tokenizer_class": "PreTrainedTokenizerFast"}',
    "special_tokens_map.json": '{"unk": "\u2047"}'.encode(),
    "generation_config.json": b"{}",
    "preprocessor_config.json": b"{ }",
    "vocab.txt": b"a\nb\r\n",
    "merges.txt": b"a b",
    "tokenizer.model": bytes(range(256)),
    "chat_template.jinja": b"{{ messages }}",
    "modeling_own.py": b"raise SystemExit('never run')",
}
LEFT = {
    "README.md": b"the base's card",
    "pytorch_model.bin": b"pickle",
    "training_args.bin": b"pickle",
    "optimizer.pt": b"pickle",
    "adapter_config.json": b"{}",
    "mergebench.json": b"{}",
    "evaluation.json": b"[]",
    "evaluation.md": b"",
    "head.safetensors": b"",
    "other.safetensors": b"",
    "pytorch_model.bin.index.json": b"{}",
    ".gitattributes": b"",
    ".hidden.json": b"{}",
}


def test_side_files(zoo: Any, tmp_path: Path) -> None:
    """Tokenizer, generation settings, code: byte for byte from the base; the rest stays behind."""
    folder = tmp_path / "models"
    shutil.copytree(zoo("llama", torch.float32), folder)
    for name, content in (COPIED | LEFT).items():
        (folder / "base" / name).write_bytes(content)
    (folder / "base" / "tokenizer_linked.json").symlink_to("tokenizer.json")
    (folder / "base" / "deep").mkdir()
    (folder / "ft1" / "tokenizer_of_ft1.json").write_text("{}")
    out = merge(folder, "ties", tmp_path / "out")
    mine = {SINGLE, "config.json", "README.md", "mergebench.json"}
    assert set(names(out)) == mine | COPIED.keys() | {"tokenizer_linked.json"}
    for name, content in COPIED.items():
        assert (out / name).read_bytes() == content
    assert not (out / "tokenizer_linked.json").is_symlink()
    assert (out / "README.md").read_bytes() != LEFT["README.md"]
    provenance = json.loads((out / "mergebench.json").read_text())
    assert set(provenance["side_files"]) == COPIED.keys() | {"config.json", "tokenizer_linked.json"}


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002])
def test_modes_by_umask(zoo: Any, tmp_path: Path, mask: int) -> None:
    """Shared storage: files others may read, where the umask lets them; those of the inputs do not matter."""
    folder = tmp_path / "models"
    shutil.copytree(zoo("llama", torch.float32), folder)
    (folder / "base" / "tokenizer.json").write_text("{}")
    for path in (folder / "base").iterdir():
        path.chmod(0o600)
    before = os.umask(mask)
    try:
        out = merge(folder, "linear", tmp_path / "out", shard_size=6000)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()}
    assert INDEX in modes and "tokenizer.json" in modes
    assert set(modes.values()) == {0o666 & ~mask}
    assert stat.S_IMODE(out.stat().st_mode) == 0o777 & ~mask


def test_shards_in_the_layout_of_the_base(zoo: Any, tmp_path: Path) -> None:
    """The same tensors in the same files, in the same order; a model without a base has the first one's."""
    folder = zoo("qwen2-moe", torch.bfloat16)
    first = [{"model": str(folder / name)} for name in ("ft1", "ft2")]
    out = merge(folder, "linear", tmp_path / "out", recipe={"models": first})
    index, origin = (json.loads((place / INDEX).read_text()) for place in (out, folder / "ft1"))
    assert index["weight_map"] == origin["weight_map"]
    assert index["metadata"]["total_size"] == origin["metadata"]["total_size"]
    for file in set(origin["weight_map"].values()):
        assert list(load_file(out / file)) == list(load_file(folder / "ft1" / file))


@pytest.mark.parametrize("size", [1, 3000, 10_000, 10**9])
def test_shard_size(zoo: Any, tmp_path: Path, size: int) -> None:
    """No file holds more, unless a single tensor is larger; every tensor is in one file."""
    out = merge(zoo("llama", torch.float32), "linear", tmp_path / "out", shard_size=size)
    files = sorted(out.glob("*.safetensors"))
    held = [load_file(file) for file in files]
    for tensors in held:
        assert len(tensors) == 1 or sum(value.nbytes for value in tensors.values()) <= size
    assert sum(map(len, held)) == len(read_model(out))
    if size == 10**9:
        assert [file.name for file in files] == [SINGLE] and not (out / INDEX).exists()
    else:
        names = [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
        assert [file.name for file in files] == names
    load(AutoModelForCausalLM, out)


def test_bare_files_and_the_config_beside_them(zoo: Any, tmp_path: Path) -> None:
    """A file named itself: no config goes along, and --verify says that it needs one before anything is merged."""
    files = [{"model": str(zoo("llama", torch.float32) / name / SINGLE)} for name in ("base", "base")]
    plan = mergebench.plan(mergebench.load({"merge_method": "linear", "models": files}))
    out = mergebench.run(plan, tmp_path / "out").out
    assert not (out / "config.json").exists()
    with pytest.raises(MergebenchError, match=r"needs a config\.json"):
        mergebench.run(plan, tmp_path / "verified", verify=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# -- verify ------------------------------------------------------------------------------------------


def verified(folder: Path, out: Path) -> None:
    plan = mergebench.plan(mergebench.load({"merge_method": "linear", "models": _models(folder)}))
    with pytest.raises(MergebenchError) as failed:
        mergebench.run(plan, out, verify=True)
    assert not out.exists()
    partial = out.with_name(f".{out.name}.partial")
    if failed.value.exit_code == 2:  # known before the work
        assert not partial.exists()
        raise failed.value
    hint = f"the checkpoint in {partial} is complete: the same command with --resume, without --verify, publishes it"
    assert failed.value.hint == hint and partial.is_dir()
    read: list[int] = []
    mergebench.run(plan, out, resume=True, progress=read.append)
    assert not partial.exists() and sum(read) == 0  # as the hint says, and no tensor is merged again
    assert {"config.json", "mergebench.json", *names(folder / "base")} <= {*names(out)}
    raise failed.value


WITHOUT_ACCELERATE = """
import sys
from importlib.machinery import PathFinder

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, *where):
        return None if name == "accelerate" else PathFinder.find_spec(name, *where)

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
import mergebench, transformers
assert not transformers.utils.is_accelerate_available()
recipe, out = sys.argv[1:]
mergebench.run(mergebench.plan(mergebench.load(recipe)), out, verify=True)
"""


@pytest.mark.parametrize("name, missing", [("llama-tied", False), ("mixtral", False), ("llama", True)])
def test_verify_needs_no_accelerate(zoo: Any, tmp_path: Path, name: str, missing: bool) -> None:
    """transformers loads onto `meta` only where accelerate is installed, and mergebench does not bring it."""
    folder, out = tmp_path / "models", tmp_path / "out"
    shutil.copytree(zoo(name, torch.float32), folder)
    if missing:
        config = json.loads((folder / "base" / "config.json").read_text())
        (folder / "base" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    recipe = write_recipe(tmp_path / "recipe.yaml", "linear", [folder / "base", folder / "ft1"])
    command = [sys.executable, "-c", WITHOUT_ACCELERATE, str(recipe), str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, "finds missing keys" in done.stderr) == (int(missing), missing), done.stderr
    assert out.exists() is not missing


def test_verify_runs_no_code_of_the_model(zoo: Any, tmp_path: Path) -> None:
    """A config that names a class in a file beside it: the file is copied, never run."""
    folder = tmp_path / "models"
    shutil.copytree(zoo("llama", torch.float32), folder)
    config = json.loads((folder / "base" / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"}}
    (folder / "base" / "config.json").write_text(json.dumps(config))
    (folder / "base" / "own.py").write_text(f"open({str(tmp_path / 'was run')!r}, 'w')")
    with pytest.raises(MergebenchError, match="code beside a model is never run"):
        verified(folder, tmp_path / "out")
    assert not (tmp_path / "was run").exists()


@pytest.mark.parametrize("change, says", [
    ({"num_hidden_layers": 3}, "missing keys"),
    ({"num_hidden_layers": 1}, "unexpected keys"),
    ({"intermediate_size": 20}, "mlp"),
    ({"architectures": ["NoSuchModel"]}, "NoSuchModel"),
    ({"model_type": "no-such-type"}, "no-such-type"),
])  # fmt: skip
def test_verify_finds_what_transformers_would(zoo: Any, tmp_path: Path, change: dict[str, Any], says: str) -> None:
    """All models lack a layer, so nothing mismatches: only the config knows."""
    folder = tmp_path / "models"
    shutil.copytree(zoo("llama", torch.float32), folder)
    config = json.loads((folder / "base" / "config.json").read_text())
    (folder / "base" / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(MergebenchError, match=says):
        verified(folder, tmp_path / "out")
