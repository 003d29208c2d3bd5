"""Bad input: one clear line that names the culprit, the right exit code, nothing written, inputs untouched.

Each case takes a healthy merge of two fine-tunes (`Setup`), breaks one thing, and says what the message
must name. `leaves_partial` marks what can only be found while the work runs: then the hidden partial
directory may stay for `--resume`.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from models import INDEX, SINGLE, fine_tuned, hashes, pack, tiny_tensors, unpack, write_model, write_recipe
from safetensors.torch import save_file

from tests.conftest import Cli, Ran

OK, FAILED, USAGE, MODEL = 0, 1, 2, 3


class Setup:
    """A working directory with base, ft1, ft2 and recipe.yaml, in which nothing is wrong yet."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors = tiny_tensors()
        self.base = write_model(folder / "base", self.tensors)
        self.ft1 = write_model(folder / "ft1", fine_tuned(self.tensors, 1))
        self.ft2 = write_model(folder / "ft2", fine_tuned(self.tensors, 2))
        self.out = folder / "out"
        self.args: list[Any] = []
        self.recipe()

    def recipe(self, method: str = "ties", models: Any = ("ft1", "ft2"), base: Any = "base", **more: Any) -> None:
        write_recipe(self.folder / "recipe.yaml", method, models, base, **more)

    def text(self, recipe: str | bytes) -> None:
        (self.folder / "recipe.yaml").write_bytes(recipe.encode() if isinstance(recipe, str) else recipe)

    def rewrite(self, model: Path, **changes: torch.Tensor | None) -> None:
        """Write a model again with tensors changed, added or (None) removed; `__` stands for a dot."""
        tensors = fine_tuned(self.tensors, 3) if model != self.base else dict(self.tensors)
        for name, value in changes.items():
            tensors.pop(name.replace("__", "."), None)
            if value is not None:
                tensors[name.replace("__", ".")] = value
        save_file(tensors, model / SINGLE)

    def header(self, model: Path, change: Callable[[dict[str, Any]], None]) -> None:
        """Change the header of a model's file, not its data."""
        header, data = unpack(model / SINGLE)
        change(header)
        (model / SINGLE).write_bytes(pack(header, data))

    def sharded(self, weight_map: Callable[[dict[str, Any]], Any]) -> None:
        """Write ft1 as two shards, with a changed index."""
        (self.ft1 / SINGLE).unlink()
        write_model(self.ft1, fine_tuned(self.tensors, 1), shards=2)
        index = json.loads((self.ft1 / INDEX).read_text())
        index["weight_map"] = weight_map(index["weight_map"])
        (self.ft1 / INDEX).write_text(json.dumps(index))

    def adapter(self, name: str = "lora", rows: int = 8, columns: int = 8, **config: Any) -> Path:
        """A LoRA directory for layers.0."""
        directory = self.folder / name
        directory.mkdir()
        settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["layers.0"], **config}
        (directory / "adapter_config.json").write_text(json.dumps(settings))
        a, b = torch.full((2, columns), 0.1), torch.full((rows, 2), 0.1)
        factors = {"base_model.model.layers.0.lora_A.weight": a, "base_model.model.layers.0.lora_B.weight": b}
        save_file(factors, directory / "adapter_model.safetensors")
        return directory

    def run(self, cli: Cli) -> Ran:
        return cli("merge", "recipe.yaml", "--out", self.out, "-q", *self.args)


@dataclass
class Case:
    name: str
    code: int
    says: tuple[str, ...]  # what the error line must contain
    breaks: Callable[[Setup], None]
    leaves_partial: bool = False
    hint: str | None = None  # what the hint must contain


CASES: list[Case] = []


def case(name: str, code: int, *says: str, **more: Any) -> Callable[[Callable[[Setup], None]], None]:
    return lambda breaks: CASES.append(Case(name, code, says, breaks, **more))


def recipe_case(name: str, code: int, *says: str, hint: str | None = None, **changes: Any) -> None:
    """A healthy setup with another recipe."""
    CASES.append(Case(name, code, says, lambda s: s.recipe(**changes), hint=hint))


def option_case(name: str, code: int, *says: str, args: tuple[str, ...], hint: str | None = None) -> None:
    """A healthy setup with more options."""
    CASES.append(Case(name, code, says, lambda s: s.args.extend(args), hint=hint))


# -- files that are missing or damaged ---------------------------------------------------------------


recipe_case("model missing", MODEL, "recipe.yaml:", "'nowhere'", models=["ft1", "nowhere"])
recipe_case("base missing", MODEL, "recipe.yaml:", "'./nowhere'", base="./nowhere")
recipe_case("file missing", MODEL, "'ft1/other.safetensors'", models=["ft1/other.safetensors", "ft2"])
recipe_case("bare name is no path", MODEL, "'bert'", hint="org/name", models=["bert", "ft2"])
recipe_case("unknown home directory", MODEL, "~nobody-of-that-name/x", models=["~nobody-of-that-name/x", "ft2"])
recipe_case("endless path", MODEL, "x" * 300, models=["x" * 300, "ft2"])
recipe_case("not a checkpoint", MODEL, "recipe.yaml", "not a .safetensors file", models=["recipe.yaml", "ft2"])


@case("directory without weights", MODEL, "'ft1'", "no .safetensors file")
def _(s: Setup) -> None:
    (s.ft1 / SINGLE).unlink()


@case("weights are a directory", FAILED, f"ft1/{SINGLE}")
def _(s: Setup) -> None:
    (s.ft1 / SINGLE).unlink()
    (s.ft1 / SINGLE).mkdir()


@case("several files and no index", MODEL, "'ft1'", INDEX)
def _(s: Setup) -> None:
    (s.ft1 / SINGLE).rename(s.ft1 / "a.safetensors")
    save_file({"b": torch.zeros(1)}, s.ft1 / "b.safetensors")


@case("truncated shard", FAILED, f"ft1/{SINGLE}", "the file has", hint="copy or download it again")
def _(s: Setup) -> None:
    raw = (s.ft1 / SINGLE).read_bytes()
    (s.ft1 / SINGLE).write_bytes(raw[:-40])


@case("empty file", FAILED, f"ft1/{SINGLE}", "0 bytes")
def _(s: Setup) -> None:
    (s.ft1 / SINGLE).write_bytes(b"")


@case("trailing bytes", FAILED, f"ft1/{SINGLE}", "4 bytes follow the last tensor")
def _(s: Setup) -> None:
    with open(s.ft1 / SINGLE, "ab") as stream:
        stream.write(b"1234")


@case("header longer than the file", FAILED, f"ft1/{SINGLE}", "claims 99999 bytes")
def _(s: Setup) -> None:
    (s.ft1 / SINGLE).write_bytes(struct.pack("<Q", 99_999) + (s.ft1 / SINGLE).read_bytes()[8:])


@case("header of a wrong length", FAILED, f"ft1/{SINGLE}", "not readable as JSON")
def _(s: Setup) -> None:
    raw = (s.ft1 / SINGLE).read_bytes()
    (s.ft1 / SINGLE).write_bytes(struct.pack("<Q", struct.unpack("<Q", raw[:8])[0] - 8) + raw[8:])


@case("header over 100 MB", FAILED, f"ft1/{SINGLE}", "claims 100000001 bytes", "100000000")
def _(s: Setup) -> None:
    with open(s.ft1 / SINGLE, "r+b") as stream:  # the bytes are there: only the claim is too large
        stream.write(struct.pack("<Q", 100_000_001))
        stream.truncate(100_000_100)


@case("header nested too deep", FAILED, f"ft1/{SINGLE}", "not readable as JSON")
def _(s: Setup) -> None:
    (s.ft1 / SINGLE).write_bytes(pack(b'{"a":' * 100_000, b""))


@case("header is a list", FAILED, f"ft1/{SINGLE}", "not a JSON object")
def _(s: Setup) -> None:
    (s.ft1 / SINGLE).write_bytes(pack(b"[1]", b""))


def _malformed(**entry: Any) -> Callable[[Setup], None]:
    return lambda s: s.header(s.ft1, lambda header: header["norm.weight"].update(entry))


for what, entry in {
    "shape is text": {"shape": "8"},
    "shape is negative": {"shape": [-3]},
    "shape is not whole": {"shape": [3.0]},
    "shape is a mapping": {"shape": {}},
    "dtype is a list": {"dtype": []},
    "offsets are three": {"data_offsets": [0, 1, 2]},
    "offsets are reversed": {"data_offsets": [12, 0]},
    "offsets are text": {"data_offsets": ["0", "12"]},
}.items():
    CASES.append(Case(what, FAILED, (f"ft1/{SINGLE}", "'norm.weight'"), _malformed(**entry)))


@case("name with a line break", FAILED, f"ft1/{SINGLE}", r"'evil\n\x1b[31m'")
def _(s: Setup) -> None:
    s.header(s.ft1, lambda header: header.update({"evil\n\x1b[31m": {"dtype": "F32"}}))


CASES.append(Case("dtype of six bits", MODEL, (f"ft1/{SINGLE}", "norm.weight", "F6_E2M3"), _malformed(dtype="F6_E2M3")))
CASES.append(Case("shape against bytes", FAILED, (f"ft1/{SINGLE}", "'norm.weight'", "12"), _malformed(shape=[4])))


@case("overlapping offsets", FAILED, f"ft1/{SINGLE}", "overlaps")
def _(s: Setup) -> None:
    def overlap(header: dict[str, Any]) -> None:
        start = header["embed.weight"]["data_offsets"][0]
        header["norm.weight"]["data_offsets"] = [start + 8, start + 20]

    s.header(s.ft1, overlap)


@case("hole between tensors", FAILED, f"ft1/{SINGLE}", "leaves a hole")
def _(s: Setup) -> None:
    s.header(s.ft1, lambda header: header.pop("layers.0.weight"))


@case("offsets past the end", FAILED, f"ft1/{SINGLE}", "the file has")
def _(s: Setup) -> None:
    header, data = unpack(s.ft1 / SINGLE)
    last = max(header.values(), key=lambda entry: entry["data_offsets"][1])
    last["shape"] = [last["shape"][0] + 1, *last["shape"][1:]]
    last["data_offsets"][1] += 4 * last["shape"][-1] if len(last["shape"]) > 1 else 4
    (s.ft1 / SINGLE).write_bytes(pack(header, data))


@case("index names a missing shard", FAILED, INDEX, "model-00003-of-00002.safetensors", "missing")
def _(s: Setup) -> None:
    s.sharded(lambda places: {**places, "norm.weight": "model-00003-of-00002.safetensors"})


for outside in ("../ft2/model.safetensors", "/etc/passwd", "..", ".", ""):
    CASES.append(
        Case(
            f"index leads outside: {outside!r}",
            FAILED,
            (f"ft1/{INDEX}", f"'{outside}'", "outside its directory"),
            lambda s, outside=outside: s.sharded(lambda places: {**places, "norm.weight": outside}),
        )
    )


@case("index places a tensor wrong", FAILED, f"ft1/{INDEX}", "'other'", "does not hold it")
def _(s: Setup) -> None:
    s.sharded(lambda places: {**places, "other": places["norm.weight"]})


for what, broken in {
    "a list": lambda places: list(places),
    "of numbers": lambda places: dict.fromkeys(places, 1),
    "of lists": lambda places: {name: ["x"] for name in places},
    "of numbers and names": lambda places: {**places, "norm.weight": 1},
}.items():
    CASES.append(
        Case(
            f"index is {what}",
            FAILED,
            (f"ft1/{INDEX}", "not a readable index"),
            lambda s, broken=broken: s.sharded(broken),
        )
    )


@case("index is not JSON", FAILED, f"ft1/{INDEX}", "not a readable index")
def _(s: Setup) -> None:
    (s.ft1 / SINGLE).unlink()
    (s.ft1 / INDEX).write_text("{")


@case("index is empty", MODEL, "'ft1'", "no tensors")
def _(s: Setup) -> None:
    s.sharded(lambda places: {})


@case("config is not JSON", FAILED, "base/config.json", "not readable as JSON")
def _(s: Setup) -> None:
    (s.base / "config.json").write_text('{"model_type": ')


@case("config of a fine-tune is not JSON", FAILED, "ft1/config.json", "not readable as JSON")
def _(s: Setup) -> None:
    (s.ft1 / "config.json").write_text("")


@case("config is not text", FAILED, "base/config.json", "not readable as JSON")
def _(s: Setup) -> None:
    (s.base / "config.json").write_bytes(b"\xff\xfe\x00")


@case("config is a list", FAILED, "base/config.json", "JSON object")
def _(s: Setup) -> None:
    (s.base / "config.json").write_text("[]")


class Bomb:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.place), "w")


for file in ("pytorch_model.bin", "model.pt", "consolidated.00.pth", "last.ckpt"):

    @case(f"only a pickle: {file}", MODEL, "'ft1'", file, hint="never loaded")
    def _(s: Setup, file: str = file) -> None:
        (s.ft1 / SINGLE).unlink()
        (s.ft1 / file).write_bytes(pickle.dumps(Bomb(s.folder / "loaded")))


@case("pickle named as a model", MODEL, "ft1/pytorch_model.bin", hint="never loaded")
def _(s: Setup) -> None:
    (s.ft1 / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(s.folder / "loaded")))
    s.recipe(models=["ft1/pytorch_model.bin", "ft2"])


@case("pickle dressed as safetensors", FAILED, f"ft1/{SINGLE}")
def _(s: Setup) -> None:
    (s.ft1 / SINGLE).write_bytes(pickle.dumps(Bomb(s.folder / "loaded")))


@case("a GGUF file by name", MODEL, "model.gguf", "GGUF", hint="the safetensors model it was made from")
def _(s: Setup) -> None:
    (s.ft1 / "model.gguf").write_bytes(b"GGUF" + bytes(64))
    s.recipe(models=["ft1/model.gguf", "ft2"])


@case("a directory of GGUF files", MODEL, "'ft1'", "only GGUF: model-q4_k_m.gguf", hint="made from")
def _(s: Setup) -> None:
    (s.ft1 / SINGLE).rename(s.ft1 / "model-q4_k_m.gguf")


@case("a GGUF file by its first bytes", MODEL, f"ft1/{SINGLE}", "a GGUF file", hint="made from")
def _(s: Setup) -> None:
    (s.ft1 / SINGLE).write_bytes(b"GGUF" + bytes(64))


@case("a pointer of Git LFS", MODEL, f"ft1/{SINGLE}", "a pointer of Git LFS", hint="git lfs pull")
def _(s: Setup) -> None:
    (s.ft1 / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n")


@case("a pipeline of several models", MODEL, "'ft1'", "no .safetensors file", hint="ft1/unet, ft1/vae")
def _(s: Setup) -> None:
    for part in ("unet", "vae"):
        write_model(s.ft1 / part, s.tensors)
    (s.ft1 / SINGLE).unlink()


@case("an adapter without its config", MODEL, "'ft1'", "an adapter, not a model", hint="BASE+DIRECTORY")
def _(s: Setup) -> None:
    lora = s.adapter()
    (lora / "adapter_model.safetensors").rename(s.ft1 / SINGLE)


GPTQ, BNB = {"quant_method": "gptq", "bits": 4}, {"quant_method": "bitsandbytes", "load_in_4bit": True}
COMPRESSED, MODELOPT = {"quant_method": "compressed-tensors"}, {"quant_algo": "NVFP4"}
CODES, FACTORS = torch.ones(4, 4, dtype=torch.uint8), torch.ones(4)
PACKED: dict[str, tuple[Any, dict[str, torch.Tensor], str]] = {
    "GPTQ": (GPTQ, {"qweight": CODES.int(), "qzeros": CODES.int(), "scales": FACTORS.half()}, "(gptq)"),
    "AWQ without a config": (None, {"qweight": CODES.int(), "scales": FACTORS}, "(GPTQ or AWQ)"),
    "bitsandbytes, 4 bits": (BNB, {"weight": CODES, "weight.absmax": FACTORS}, "(bitsandbytes)"),
    "bitsandbytes, 8 bits": (None, {"weight": CODES.char(), "SCB": FACTORS}, "(bitsandbytes)"),
    "compressed-tensors": (COMPRESSED, {"weight_packed": CODES.int(), "weight_scale": FACTORS}, "(compressed-tensors)"),
    "modelopt": (MODELOPT, {"weight": CODES, "weight_scale": FACTORS}, "(NVFP4)"),
    "OpenAI's own MXFP4": (None, {"weight.blocks": CODES, "weight.scales": CODES + 1}, "(MXFP4)"),
    "MXFP4": (None, {"gate_up_proj_blocks": CODES, "gate_up_proj_scales": CODES + 1}, "(MXFP4)"),
}
for what, (settings, parts, says) in PACKED.items():
    for model in ("ft1", "base"):

        @case(f"{what} in {model}", MODEL, f"'{model}' is quantized {says}", "layers.0.", hint="quantize the result")
        def _(s: Setup, settings: Any = settings, parts: Any = parts, model: str = model) -> None:
            packed = {f"layers__0__{name.replace('.', '__')}": value for name, value in parts.items()}
            s.rewrite(s.folder / model, **{"layers__0__weight": None, **packed})
            config = {"model_type": "llama"} | ({"quantization_config": settings} if settings else {})
            (s.folder / model / "config.json").write_text(json.dumps(config))


@case("a tensor named by half of a character", FAILED, f"ft1/{SINGLE}", r"'\ud800' is half of a character")
def _(s: Setup) -> None:
    s.header(s.ft1, lambda header: header.update({"\ud800": header.pop("norm.weight")}))


@case("config nested too deep", FAILED, "ft1/config.json", "nested too deep")
def _(s: Setup) -> None:
    (s.ft1 / "config.json").write_text('{"a":' * 100_000)


@case("index nested too deep", FAILED, f"ft1/{INDEX}", "nested too deep")
def _(s: Setup) -> None:
    (s.ft1 / SINGLE).unlink()
    (s.ft1 / INDEX).write_text("[" * 100_000)


@case("architectures are no list", FAILED, "ft1/config.json", "architectures: must be a list, got a mapping")
def _(s: Setup) -> None:
    (s.ft1 / "config.json").write_text(json.dumps({"architectures": {"0": "LlamaForCausalLM"}}))


@case("a pipe in place of the weights", FAILED, f"ft1/{SINGLE}", "not a regular file")
def _(s: Setup) -> None:
    (s.ft1 / SINGLE).unlink()
    os.mkfifo(s.ft1 / SINGLE)


@case("a pipe in place of an adapter's config", FAILED, "lora/adapter_config.json", "not a regular file")
def _(s: Setup) -> None:
    (s.adapter() / "adapter_config.json").unlink()
    os.mkfifo(s.folder / "lora/adapter_config.json")
    s.recipe(models=["base+lora", "ft2"])


@case("a pipe in place of the recipe", USAGE, "recipe.yaml", "not a regular file")
def _(s: Setup) -> None:
    (s.folder / "recipe.yaml").unlink()
    os.mkfifo(s.folder / "recipe.yaml")


@case("an output whose name is not UTF-8", USAGE, "its path is not UTF-8", hint="--out")
def _(s: Setup) -> None:
    s.out = s.folder / "out\udcff"


recipe_case(
    "a gradient over nothing",
    USAGE,
    "include/exclude leave no tensor",
    method="linear",
    include=["no.such.*"],
    parameters={"weight": [0, 1]},
)


for what, changes, says in (
    ("base is a mapping", {"base_model_name_or_path": {"a": 1}}, "base_model_name_or_path: must be text"),
    ("alpha beyond float64", {"lora_alpha": 10**400}, "a number is too large"),
    ("alpha of a module is NaN", {"alpha_pattern": {"layers": float("nan")}}, "alpha_pattern"),
    ("alpha of a module is infinite", {"alpha_pattern": {"layers": float("inf")}}, "alpha_pattern"),
    ("a name is half of a character", {"modules_to_save": ["\ud800"]}, "is half of a character"),
    ("its pattern is none", {"alpha_pattern": {"(": 1}}, "'(' is no regular expression"),
):

    @case(f"adapter: {what}", MODEL if "pattern" in says or "regular" in says else FAILED, "adapter_config.json", says)
    def _(s: Setup, changes: dict[str, Any] = changes) -> None:
        s.adapter(**changes)
        s.recipe(models=["base+lora", "ft2"])


# -- models that do not fit --------------------------------------------------------------------------


@case("shape mismatch", MODEL, "layers.0.weight", "ft1 has [8, 4], base has [8, 8]", hint="exclude")
def _(s: Setup) -> None:
    s.rewrite(s.ft1, layers__0__weight=torch.zeros(8, 4))


@case("transposed", MODEL, "embed.weight", "ft2 has [8, 11], base has [11, 8]")
def _(s: Setup) -> None:
    s.rewrite(s.ft2, embed__weight=torch.zeros(8, 11))


@case("integers against floats", MODEL, "norm.weight", "ft1 has I64, base has F32")
def _(s: Setup) -> None:
    s.rewrite(s.ft1, norm__weight=torch.zeros(3, dtype=torch.int64))


@case("floats against integers", MODEL, "steps", "ft1 has F32, base has I64")
def _(s: Setup) -> None:
    s.rewrite(s.ft1, steps=torch.zeros(5))


@case("missing tensor", MODEL, "layers.1.bias", "ft1 does not have it")
def _(s: Setup) -> None:
    s.rewrite(s.ft1, layers__1__bias=None)


@case("extra tensor", MODEL, "layers.2.bias", "ft2 has [8]", "base does not have it")
def _(s: Setup) -> None:
    s.rewrite(s.ft2, layers__2__bias=torch.zeros(8))


@case("several mismatches", MODEL, "embed.weight", "and 1 more")
def _(s: Setup) -> None:
    s.rewrite(s.ft1, embed__weight=torch.zeros(12, 8), layers__1__bias=None)


def _config(s: Setup, model: Path, **config: Any) -> None:
    (model / "config.json").write_text(json.dumps({"model_type": "llama", **config}))


@case("another architecture", MODEL, "ft1 is of type bert, base of type llama: hidden_size 4 against 8",
      hint="one architecture")  # fmt: skip
def _(s: Setup) -> None:
    tensors = {f"bert.layer.{n}.weight": torch.ones(4, 4) for n in range(9)}
    write_model(s.ft1, tensors, config={"model_type": "bert", "hidden_size": 4})
    _config(s, s.base, hidden_size=8)


@case("another size", MODEL, "ft2 is of another size than base: hidden_size 4 against 8", hint="one architecture")
def _(s: Setup) -> None:
    write_model(s.ft2, {name: value[..., :4] for name, value in s.tensors.items()})
    _config(s, s.base, hidden_size=8)
    _config(s, s.ft2, hidden_size=4)


@case("more layers", MODEL, "ft1 has other layers than base: num_hidden_layers 3 against 2", hint="one architecture")
def _(s: Setup) -> None:
    s.rewrite(s.ft1, layers__2__weight=torch.ones(8, 8), layers__2__bias=torch.ones(8))
    _config(s, s.base, num_hidden_layers=2)
    _config(s, s.ft1, num_hidden_layers=3)


@case("names that no rule explains", MODEL, "ft1 has 6 tensors that base does not have (decoder.embed.weight, ",
      "and lacks 6 of base's (embed.weight, ", hint="no known rule")  # fmt: skip
def _(s: Setup) -> None:
    tensors = fine_tuned(s.tensors, 1)
    write_model(s.ft1, {f"decoder.{name}": value for name, value in tensors.items()})


@case("names that two rules explain", MODEL, "ft1 has 3 tensors that base does not have (h.0.weight, h.1.weight, ",
      hint="several do")  # fmt: skip
def _(s: Setup) -> None:
    tower = {f"h.{n}.weight": torch.ones(4, 4) for n in range(3)}
    write_model(s.base, {f"{which}_model.{n}": v for which in ("text", "vision") for n, v in tower.items()})
    write_model(s.ft1, tower)
    write_model(s.ft2, tower)


@case("a part that only the base has", MODEL, "vision.0.weight", "ft1 does not have it", "and 2 more",
      hint='exclude: ["vision.*"]')  # fmt: skip
def _(s: Setup) -> None:
    s.rewrite(s.base, **{f"vision__{n}__weight": torch.ones(2) for n in range(3)})
    s.recipe(models=["ft1"])


@case("head that is not the tied one", MODEL, "lm_head.weight", "ft1", "embed_tokens.weight", hint="exclude")
def _(s: Setup) -> None:
    config = {"model_type": "llama", "tie_word_embeddings": True}
    tensors = {"embed_tokens.weight": torch.ones(4, 2), "norm.weight": torch.ones(2)}
    write_model(s.base, tensors, config=config)
    write_model(s.ft1, tensors | {"lm_head.weight": torch.zeros(4, 2)}, config=config)
    write_model(s.ft2, tensors, config=config)


for dtype in (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz):

    @case(f"{dtype} in a model", MODEL, "layers.0.weight", "ft1", "this type is not supported yet")
    def _(s: Setup, dtype: torch.dtype = dtype) -> None:
        s.rewrite(s.ft1, layers__0__weight=torch.zeros(8, 8).to(dtype))


@case("scales of their own in the base", MODEL, "layers.0.weight", "base", "F8_E8M0", "this type is not supported yet")
def _(s: Setup) -> None:
    s.rewrite(s.base, layers__0__weight=torch.ones(8, 8).to(torch.float8_e8m0fnu))


@case("FP8 without its scale", MODEL, "layers.0.weight", "ft1", "F8_E4M3 and no scale", hint="layers.0.weight_scale")
def _(s: Setup) -> None:
    s.rewrite(s.ft1, layers__0__weight=torch.zeros(8, 8).to(torch.float8_e4m3fn))
    (s.ft1 / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "fp8"}}))


for what, scale in {"shape": torch.ones(3, 1), "sides": torch.ones(2, 2, 2), "type": torch.ones(8, dtype=int)}.items():

    @case(f"an FP8 scale of the wrong {what}", MODEL, "layers.0.weight_scale", "ft1", "the tensor has [8, 8]")
    def _(s: Setup, scale: torch.Tensor = scale) -> None:
        fp8 = torch.zeros(8, 8).to(torch.float8_e4m3fn)
        s.rewrite(s.ft1, layers__0__weight=fp8, layers__0__weight_scale=scale)


@case("an FP8 scale that is no number", FAILED, "layers.0.weight", "ft1", "nan", leaves_partial=True)
def _(s: Setup) -> None:
    fp8 = torch.ones(8, 8).to(torch.float8_e4m3fn)
    s.rewrite(s.ft1, layers__0__weight=fp8, layers__0__weight_scale=torch.tensor([float("nan")]))


@case("an MXFP4 scale that is no number", FAILED, "layers.0.experts.x", "ft1", "nan at [0, 0, 0]", leaves_partial=True)
def _(s: Setup) -> None:
    blocks = {"layers__0__experts__x_blocks": torch.ones(1, 2, 1, 16, dtype=torch.uint8)}
    for place, scale in ((s.base, 120), (s.ft1, 255), (s.ft2, 120)):
        scales = torch.full((1, 2, 1), scale, dtype=torch.uint8)
        s.rewrite(place, **blocks, layers__0__experts__x_scales=scales)


@case("MXFP4 without its scales", MODEL, "experts.x_blocks", "ft1 has MXFP4", hint="layers.0.experts.x_scales")
def _(s: Setup) -> None:
    s.rewrite(s.ft1, layers__0__experts__x_blocks=torch.ones(1, 2, 1, 16, dtype=torch.uint8))


@case("adapter for another base", MODEL, "lora", "'other.weight'", hint="another model")
def _(s: Setup) -> None:
    lora = s.adapter()
    factors = {"base_model.model.other.lora_A.weight": torch.zeros(2, 8)}
    save_file(factors | {"base_model.model.other.lora_B.weight": torch.zeros(8, 2)}, lora / "adapter_model.safetensors")
    s.recipe(models=["base+lora", "ft2"])


@case("adapter for a larger base", MODEL, "lora", "layers.0", "[16, 8], base has [8, 8]", hint="another model")
def _(s: Setup) -> None:
    s.adapter(rows=16)
    s.recipe(models=["base+lora", "ft2"])


@case("adapter as a model", MODEL, "'lora'", "adapter", hint="BASE+lora")
def _(s: Setup) -> None:
    s.adapter()
    s.recipe(models=["lora", "ft2"])


@case("adapter missing", MODEL, "'nowhere'")
def _(s: Setup) -> None:
    s.recipe(models=["base+nowhere", "ft2"])


@case("model in the adapter's place", MODEL, "ft1", "not an adapter", hint="BASE+ADAPTER")
def _(s: Setup) -> None:
    s.recipe(models=["base+ft1", "ft2"])


@case("adapter as a pickle", MODEL, "lora", "never loaded", hint="safetensors")
def _(s: Setup) -> None:
    lora = s.adapter()
    (lora / "adapter_model.safetensors").unlink()
    (lora / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(s.folder / "loaded")))
    s.recipe(models=["base+lora", "ft2"])


for what, config, code, says in [
    ("DoRA", {"use_dora": True}, MODEL, "use_dora"),
    ("trained biases", {"bias": "all"}, MODEL, "bias: all"),
    ("LoRA bias", {"lora_bias": True}, MODEL, "lora_bias"),
    ("modules saved whole", {"modules_to_save": ["head"]}, MODEL, "modules_to_save"),
    ("another kind", {"peft_type": "PROMPT_TUNING"}, MODEL, "its tensors are prompts"),
    ("rank in words", {"r": "two"}, MODEL, "it must be a whole number"),
    ("broken pattern", {"alpha_pattern": {"[": 8}}, MODEL, "alpha_pattern"),
    ("pattern in words", {"alpha_pattern": {"layers.0": "much"}}, MODEL, "alpha_pattern"),
    ("pattern as a list", {"alpha_pattern": ["layers.0"]}, MODEL, "alpha_pattern"),
]:

    @case(f"adapter: {what}", code, "lora", says)
    def _(s: Setup, config: dict[str, Any] = config) -> None:
        s.adapter(**config)
        s.recipe(models=["base+lora", "ft2"])


@case("adapter's config is not JSON", FAILED, "lora/adapter_config.json", "not readable as JSON")
def _(s: Setup) -> None:
    (s.adapter() / "adapter_config.json").write_text("{")
    s.recipe(models=["base+lora", "ft2"])


@case("adapter's config is a list", FAILED, "lora/adapter_config.json", "JSON")
def _(s: Setup) -> None:
    (s.adapter() / "adapter_config.json").write_text("[]")
    s.recipe(models=["base+lora", "ft2"])


@case("half a LoRA pair", MODEL, "lora", "layers.0", "only one of lora_A and lora_B")
def _(s: Setup) -> None:
    lora = s.adapter()
    save_file({"base_model.model.layers.0.lora_A.weight": torch.zeros(2, 8)}, lora / "adapter_model.safetensors")
    s.recipe(models=["base+lora", "ft2"])


# -- values ------------------------------------------------------------------------------------------


for value in (float("nan"), float("inf"), float("-inf")):
    for model in ("ft1", "base"):

        @case(f"{value} in {model}", FAILED, "layers.1.weight", model, str(value), "[2, 5]", leaves_partial=True)
        def _(s: Setup, value: float = value, model: str = model) -> None:
            broken = torch.zeros(8, 8)
            broken[2, 5] = value
            s.rewrite(s.folder / model, layers__1__weight=broken)


@case("NaN in a bfloat16 model, linear", FAILED, "norm.weight", "ft2", "nan", "[1]", leaves_partial=True)
def _(s: Setup) -> None:
    s.rewrite(s.ft2, norm__weight=torch.tensor([0, float("nan"), 0], dtype=torch.bfloat16))
    s.recipe("linear", base=None)


@case("NaN far into a tensor", FAILED, "embed.weight", "ft2", "nan", "[300, 123]", leaves_partial=True)
def _(s: Setup) -> None:
    for model in (s.base, s.ft1, s.ft2):
        s.rewrite(model, embed__weight=torch.ones(400, 256))
    broken = torch.ones(400, 256)
    broken[300, 123] = float("nan")
    s.rewrite(s.ft2, embed__weight=broken)


@case("NaN in an adapter", FAILED, "layers.0.weight", "lora", "nan", leaves_partial=True)
def _(s: Setup) -> None:
    lora = s.adapter()
    factors = {"base_model.model.layers.0.lora_A.weight": torch.full((2, 8), float("nan"))}
    factors["base_model.model.layers.0.lora_B.weight"] = torch.ones(8, 2)
    save_file(factors, lora / "adapter_model.safetensors")
    s.recipe(models=["base+lora", "ft2"])


@case("overflow at the cast to float16", FAILED, "norm.weight", "F16", hint="float32", leaves_partial=True)
def _(s: Setup) -> None:
    for model in (s.base, s.ft1, s.ft2):
        s.rewrite(model, norm__weight=torch.tensor([1.0, 70_000.0, 1.0]))
    s.recipe("linear", dtype="float16")


@case("overflow of a copied tensor at the cast", FAILED, "norm.weight", "F16", hint="float32", leaves_partial=True)
def _(s: Setup) -> None:
    s.rewrite(s.base, norm__weight=torch.tensor([1.0, 70_000.0, 1.0]))
    s.recipe("linear", dtype="float16", exclude=["norm.*"])


@case("zero task vector under pcb", FAILED, "same", "task vector is zero", leaves_partial=True)
def _(s: Setup) -> None:
    write_model(s.folder / "same", s.tensors)
    s.recipe("pcb", models=["ft1", "same"])


# -- recipes -----------------------------------------------------------------------------------------


recipe_case("unknown method", USAGE, "recipe.yaml:", "merge_method", "'tise'", hint="'ties'", method="tise")
recipe_case("unknown parameter", USAGE, "parameters.densty", "'ties'", hint="'density'", parameters={"densty": 0.5})
recipe_case("unknown key", USAGE, "recipe.yaml:", "exlude", hint="'exclude'", exlude=["*"])
recipe_case("density 0", USAGE, "parameters.density", "above 0", "got 0", parameters={"density": 0})
recipe_case("density 5", USAGE, "parameters.density", "at most 1", "got 5", parameters={"density": 5})
recipe_case("density in words", USAGE, "parameters.density", "'most'", parameters={"density": "most"})
recipe_case("density of one model", USAGE, "models.0.parameters.density", "got 0", models=[
    {"model": "ft1", "parameters": {"density": 0}}, {"model": "ft2"}])  # fmt: skip
recipe_case("dtype of another world", USAGE, "dtype", "'int8'", dtype="int8")
recipe_case("dtype is short", USAGE, "dtype", "'bf16'", hint="'bfloat16'", dtype="bf16")
recipe_case("no models", USAGE, "models", "names no model", models=[])
recipe_case("seed is negative", USAGE, "seed", "-1", seed=-1)
recipe_case("exclude is text", USAGE, "exclude", "'*.bias'", exclude="*.bias")
recipe_case("nothing left to merge", USAGE, "exclude", "no tensor to merge", exclude=["*"])
recipe_case("no base", USAGE, "base_model", "'ties'", base=None)
recipe_case("task vector without a base", USAGE, "models.0.task_vector", method="linear", base=None,
            models=[{"task_vector": "ft1"}])  # fmt: skip
recipe_case("one model too many", USAGE, "'slerp'", "2 models", method="slerp", parameters={"t": 0.5}, base=None,
            models=["ft1", "ft2", "base"])  # fmt: skip
recipe_case("missing parameter", USAGE, "parameters.t", "'slerp'", method="slerp", models=["ft1"])
recipe_case("weights add up to zero", USAGE, "parameters.weight", "zero", method="linear", base=None, models=[
    {"model": "ft1", "parameters": {"weight": 1}}, {"model": "ft2", "parameters": {"weight": -1}}])  # fmt: skip
recipe_case("an edit without a probe", USAGE, "recipe.yaml:", "edits.0.probe: missing", edits=[{"edit": "surgery"}])
recipe_case("no tokenizer to join", MODEL, "model 'base'", "no tokenizer", tokenizer_source="union")
recipe_case("a gradient out of range", USAGE, "density.1", "at most 1", parameters={"density": [0.1, 9]})
BARE = [{"filter": "mlp"}]
recipe_case("a filter without a value", USAGE, "density.0", "{filter, value}", parameters={"density": BARE})
recipe_case("slices beside models", USAGE, "slices", "cannot be given with models",
            slices=[{"sources": [{"model": "ft1", "layer_range": [0, 1]}]}])  # fmt: skip

for what, text, says in [
    ("empty recipe", "", ("recipe.yaml", "empty")),
    ("recipe of comments", "# nothing\n", ("recipe.yaml", "empty")),
    ("broken YAML", "merge_method: ties\nmodels: [\n", ("recipe.yaml:", "not valid YAML")),
    ("tab in YAML", "merge_method:\n\t- ties\n", ("recipe.yaml:2", "not valid YAML")),
    ("duplicate key", "merge_method: ties\nmerge_method: linear\n", ("recipe.yaml:2:1", "given twice")),
    ("models are a mapping", "merge_method: linear\nmodels: {model: ft1}\n", ("recipe.yaml:2:1", "models", "a list")),
    ("recipe is a list", "- merge_method: ties\n", ("recipe.yaml", "mapping")),
    ("recipe is not text", b"merge_method: \xff\xfe", ("recipe.yaml:1", "UTF-8")),
]:
    CASES.append(Case(what, USAGE, says, lambda s, text=text: s.text(text)))


@case("recipe missing", USAGE, "recipe.yaml", "no such file")
def _(s: Setup) -> None:
    (s.folder / "recipe.yaml").unlink()


@case("recipe is a directory", USAGE, "recipe.yaml", "directory")
def _(s: Setup) -> None:
    (s.folder / "recipe.yaml").unlink()
    (s.folder / "recipe.yaml").mkdir()


# -- options -----------------------------------------------------------------------------------------


for size in ("much", "0", "-1", "400 bananas", "", "nan"):
    option_case(f"memory {size!r}", USAGE, "--memory", f"'{size}'", hint="400MB", args=(f"--memory={size}",))
option_case("too little memory", USAGE, "--memory 1MB", "at least", hint="memory", args=("--memory", "1MB"))
option_case("shard size in words", USAGE, "--shard-size", "'big'", hint="4GB", args=("--shard-size", "big"))
option_case("device of another world", USAGE, "--device", "'tpu'", hint="cpu", args=("--device", "tpu"))
option_case("unknown place for --set", USAGE, "--set", "paramters.density=1", args=("--set", "paramters.density=1"))
option_case("unknown parameter for --set", USAGE, "--set parameters.densty=1", args=("--set", "parameters.densty=1"))
option_case("--set without a value", USAGE, "--set", "density", args=("--set", "density"))
option_case("--set for a third model", USAGE, "--set", "models", "'7'", args=("--set", "models.7.model=x"))
option_case("negative seed", USAGE, "--seed", "-1", args=("--seed", "-1"))


@case("no CUDA device", USAGE, "--device cuda", hint="auto")
def _(s: Setup) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    s.args = ["--device", "cuda"]


# -- outputs -----------------------------------------------------------------------------------------


for overwrite in ([], ["--overwrite"], ["--resume"]):
    for what, target in {
        "an input": "ft1",
        "the base": "base",
        "inside an input": "ft1/merged",
        "around an input": ".",
        "an input by another name": "base/../ft2",
        "a link to an input": "link",
    }.items():

        @case(f"output is {what} {''.join(overwrite)}", USAGE, "input")
        def _(s: Setup, target: str = target, overwrite: list[str] = overwrite) -> None:
            (s.folder / "link").symlink_to("ft2")
            (s.ft1 / "mergebench.json").write_text("{}")  # an earlier result may be an input
            s.out, s.args = Path(target), overwrite


@case("output is an adapter", USAGE, "input", "lora")
def _(s: Setup) -> None:
    s.adapter()
    s.recipe(models=["base+lora", "ft2"])
    s.out = s.folder / "lora"


@case("output holds a bare file that is an input", USAGE, "input", "one.safetensors")
def _(s: Setup) -> None:
    (s.folder / "single").mkdir()
    (s.ft1 / SINGLE).rename(s.folder / "single" / "one.safetensors")
    s.recipe(models=["single/one.safetensors", "ft2"])
    s.out, s.args = s.folder / "single", ["--overwrite"]


for hidden in (".out.partial", ".out.old"):

    @case(f"an input is called {hidden}", USAGE, "input", hidden)
    def _(s: Setup, hidden: str = hidden) -> None:
        s.ft1.rename(s.folder / hidden)
        s.recipe(models=[hidden, "ft2"])
        write_model(s.out, s.tensors, side_files={"mergebench.json": "{}"})
        s.args = ["--overwrite"]


@case("output is a file", USAGE, "out", "not a directory")
def _(s: Setup) -> None:
    s.out.write_text("mine")


@case("output below a file", FAILED, "recipe.yaml")
def _(s: Setup) -> None:
    s.out = s.folder / "recipe.yaml" / "out"


@case("output with an endless name", FAILED, "o" * 140)
def _(s: Setup) -> None:
    s.out = s.folder / ("o" * 300)


for overwrite in ([], ["--overwrite"], ["--resume"]):

    @case(f"output holds something else {''.join(overwrite)}", USAGE, "out", "mergebench did not make it")
    def _(s: Setup, overwrite: list[str] = overwrite) -> None:
        s.out.mkdir()
        (s.out / "thesis.txt").write_text("years of work")
        s.args = overwrite


@case("output is finished already", USAGE, "out", "finished result", hint="--overwrite")
def _(s: Setup) -> None:
    write_model(s.out, s.tensors, side_files={"mergebench.json": "{}"})


@case("another's directory in the way", USAGE, ".out.partial", "mergebench did not make it")
def _(s: Setup) -> None:
    partial = s.folder / ".out.partial"
    partial.mkdir()
    (partial / "thesis.txt").write_text("years of work")


# -- the test ----------------------------------------------------------------------------------------


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setup:
    monkeypatch.chdir(tmp_path)
    return Setup(tmp_path)


@pytest.mark.parametrize("bad", CASES, ids=lambda bad: bad.name)
def test_bad_input(bad: Case, setup: Setup, cli: Cli) -> None:
    bad.breaks(setup)
    before = hashes(setup.folder)

    code, out, err = setup.run(cli)

    assert_one_line(err, bad)
    assert code == bad.code
    assert out == ""
    assert_nothing_written(setup, before, bad.leaves_partial)


def assert_one_line(err: str, bad: Case) -> None:
    lines = [line for line in err.splitlines() if not (bad.leaves_partial and line.startswith("left: .out.partial "))]
    assert lines, "nothing was said"
    assert lines[0].startswith("error: ")
    for word in bad.says:
        assert word in lines[0]
    assert len(lines) <= 2
    if len(lines) == 2:
        assert lines[1].startswith("hint: ")
    if bad.hint is not None:
        assert len(lines) == 2
        assert bad.hint in lines[1]


def assert_nothing_written(setup: Setup, before: dict[str, str], leaves_partial: bool) -> None:
    after = hashes(setup.folder)
    new = after.keys() - before.keys()
    if leaves_partial:
        new = {name for name in new if not name.startswith(".out.partial")}
        for sign in ("mergebench.json", INDEX, "config.json"):
            assert f".out.partial/{sign}" not in after
    assert not new
    assert {name: after.get(name) for name in before} == before


def test_the_setup_is_healthy(setup: Setup, cli: Cli) -> None:
    """Without the breakage the same command works: the cases fail for their own reason."""
    before = hashes(setup.folder)
    assert setup.run(cli).code == OK
    after = hashes(setup.folder)
    assert {name: after[name] for name in before} == before
    assert "out/mergebench.json" in after
    assert not any(name.startswith(".") for name in after)


@pytest.mark.parametrize("name", ["shape mismatch", "unknown parameter", "NaN in a bfloat16 model, linear"])
def test_bad_input_to_a_real_process(name: str, setup: Setup, shell: Cli) -> None:
    """The same through the installed command's own start and end."""
    (bad,) = (bad for bad in CASES if bad.name == name)
    bad.breaks(setup)
    before = hashes(setup.folder)
    code, out, err = setup.run(shell)
    assert (code, out) == (bad.code, "")
    assert_one_line(err, bad)
    assert_nothing_written(setup, before, bad.leaves_partial)
