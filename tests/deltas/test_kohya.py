"""Adapters of kohya, LyCORIS and diffusers: the formulas by brute force, on bases in each tool's names."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mergebench.deltas.kohya.unet import in_diffusers, layers_of
from mergebench.deltas.open import open_model
from mergebench.errors import ModelError
from tests.conftest import Cli

RANK = 3
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
UNET = {
    f"{BLOCK}.attn1.to_q": (8, 8),
    f"{BLOCK}.attn1.to_out.0": (8, 8),
    f"{BLOCK}.ff.net.0.proj": (12, 8),
    "down_blocks.0.attentions.0.proj_in": (8, 8, 1, 1),
    "down_blocks.0.resnets.1.conv1": (8, 4, 3, 3),
    "up_blocks.1.upsamplers.0.conv": (8, 8, 3, 3),
    "conv_norm_out": (8,),
}
TEXT = {"text_model.encoder.layers.0.self_attn.q_proj": (6, 6)}
SD = {  # the same layers in a single file's names, with two layers in a block
    f"{BLOCK}.": "input_blocks.1.1.transformer_blocks.0.",
    "down_blocks.0.attentions.0.proj_in": "input_blocks.1.1.proj_in",
    "down_blocks.0.resnets.1.conv1": "input_blocks.2.0.in_layers.2",
    "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
    "conv_norm_out": "out.0",
}


def in_one_file(name: str) -> str:
    """A layer's name in a single file."""
    start = next(start for start in SD if name.startswith(start))
    return SD[start] + name.removeprefix(start)


def weights(random: torch.Generator) -> dict[str, Tensor]:
    """The tensors of a pipeline, by component and name."""
    made = {}
    for folder, layers in (("unet", UNET), ("text_encoder", TEXT)):
        for name, shape in layers.items():
            made[f"{folder}/{name}.weight"] = torch.randn(shape, generator=random)
            made[f"{folder}/{name}.bias"] = torch.randn(shape[0], generator=random)
    return made


def pipeline(place: Path, tensors: Mapping[str, Tensor]) -> Path:
    for folder in ("unet", "text_encoder"):
        (place / folder).mkdir(parents=True)
        own = {name.partition("/")[2]: value for name, value in tensors.items() if name.startswith(folder)}
        save_file(own, place / folder / "model.safetensors")
    listed = {folder: ["diffusers", "A"] for folder in ("unet", "text_encoder")}
    (place / "model_index.json").write_text(json.dumps(listed))
    return place


def flat(name: str, of: str = "lora_unet_") -> str:
    return of + name.replace(".", "_")


def factors(shape: tuple[int, ...], random: torch.Generator, rank: int = RANK) -> tuple[Tensor, Tensor]:
    """B and A as kohya stores those of a layer."""
    kernel = shape[2:]
    b = torch.randn(shape[0], rank, *(1 for _ in kernel), generator=random)
    return b, torch.randn(rank, shape[1], *kernel, generator=random)


def product(b: Tensor, a: Tensor, shape: tuple[int, ...]) -> Tensor:
    return (b.flatten(1) @ a.flatten(1)).view(shape)


@pytest.fixture
def random() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def folded(base: Path, file: Path) -> dict[str, Tensor]:
    return open_model(f"{base}+{file}").state_dict()


def check(base: Path, file: Path, expected: Mapping[str, Tensor]) -> None:
    found = folded(base, file)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("names", ["kohya", "kohya, as a single file", "diffusers", "older diffusers", "ComfyUI"])
@pytest.mark.parametrize("base", ["pipeline", "single file"])
def test_low_rank_factors(tmp_path: Path, random: torch.Generator, names: str, base: str) -> None:
    """Every way to name a layer, on a pipeline and on the same in one file; with an alpha and without."""
    tensors = weights(random)
    expected, adapter = {name: value.clone() for name, value in tensors.items()}, {}
    layers = {"unet/" + name: shape for name, shape in UNET.items() if len(shape) > 1}
    layers |= {"text_encoder/" + name: shape for name, shape in TEXT.items() if names != "ComfyUI"}
    ends = {"diffusers": ("lora_A", "lora_B"), "older diffusers": ("lora.down", "lora.up")}
    down, up = ends.get(names, ("lora_down", "lora_up"))
    for number, (layer, shape) in enumerate(layers.items()):
        folder, _, inner = layer.partition("/")
        b, a = factors(shape, random)
        key = layer.replace("/", ".")
        if names == "ComfyUI":
            key = f"diffusion_model.{inner}"
        elif names.startswith("kohya"):
            whole = names != "kohya" and folder == "unet"
            key = flat(in_one_file(inner) if whole else inner, "lora_unet_" if folder == "unet" else "lora_te_")
        adapter |= {f"{key}.{down}.weight": a, f"{key}.{up}.weight": b}
        scale = 1.0
        if number % 2:
            adapter[f"{key}.alpha"], scale = torch.tensor(1.5), 1.5 / RANK
        expected[f"{layer}.weight"] += scale * product(b, a, shape)
    save_file(adapter, tmp_path / "lora.safetensors", metadata={"format": "pt"})
    if base == "pipeline":
        check(pipeline(tmp_path / "base", tensors), tmp_path / "lora.safetensors", expected)
        return
    of = {"unet": "model.diffusion_model.", "text_encoder": "cond_stage_model.transformer."}
    renamed = {}
    for name in tensors:
        folder, _, inner = name.partition("/")
        layer, _, end = inner.rpartition(".")
        renamed[name] = of[folder] + (in_one_file(layer) if folder == "unet" else layer) + f".{end}"
    more = {
        "model.diffusion_model.input_blocks.3.0.op.weight": torch.ones(2, 2, 3, 3),
        "first_stage_model.x": torch.ones(2),
    }
    save_file({renamed[name]: value for name, value in tensors.items()} | more, tmp_path / "sd.safetensors")
    expected = {renamed[name]: value for name, value in expected.items()}
    check(tmp_path / "sd.safetensors", tmp_path / "lora.safetensors", expected | more)


def hadamard(parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    halves = []
    for number in "12":
        a, b, t = (parts.get(f"hada_{word}") for word in (f"w{number}_a", f"w{number}_b", f"t{number}"))
        assert a is not None and b is not None
        halves.append(a @ b if t is None else torch.einsum("ijkl,jr,ip->prkl", t, b, a))
    return (halves[0] * halves[1]).view(shape)


def norms(value: Tensor, inputs: bool) -> Tensor:
    over = [dim for dim in range(value.dim()) if dim != (1 if inputs else 0)]
    return value.square().sum(over, keepdim=True).sqrt()


def lycoris(
    case: str, shape: tuple[int, ...], random: torch.Generator
) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
    """The parts of a layer, the difference that they make, and DoRA's norms."""

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=random)

    rank, (rows, columns), kernel = 2, shape[:2], shape[2:]
    flat_columns = columns * math.prod(kernel)
    alpha = {"alpha": torch.tensor(5.0)}
    if case == "core":
        up, mid, down = normal(rows, rank, 1, 1), normal(rank, rank, *kernel), normal(rank, columns, 1, 1)
        made = torch.einsum("om,mnkl,ni->oikl", up.flatten(1), mid, down.flatten(1))
        return {"lora_up.weight": up, "lora_mid.weight": mid, "lora_down.weight": down} | alpha, 2.5 * made, None
    if case.startswith("loha"):
        parts = {
            f"hada_w{n}_{end}": normal(*size)
            for n in "12"
            for end, size in (("a", (rows, rank)), ("b", (rank, flat_columns)))
        }
        if case == "loha core":
            parts = {
                f"hada_w{n}_{end}": normal(rank, size) for n in "12" for end, size in (("a", rows), ("b", columns))
            }
            parts |= {f"hada_t{n}": normal(rank, rank, *kernel) for n in "12"}
        return parts | alpha, 2.5 * hadamard(parts, shape), None
    if case == "lokr":
        w1, w2 = normal(2, 2), normal(rows // 2, columns // 2, *kernel)
        return {"lokr_w1": w1, "lokr_w2": w2} | alpha, torch.kron(w1, w2.contiguous().flatten(1)).view(shape), None
    if case == "lokr factors":
        w1, a, b = normal(2, 2), normal(rows // 2, rank), normal(rank, flat_columns // 2)
        made = torch.kron(w1, a @ b).view(shape)
        return {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b} | alpha, 2.5 * made, None
    if case == "lokr core":
        w1, t, a, b = normal(2, 2), normal(rank, rank, *kernel), normal(rank, rows // 2), normal(rank, columns // 2)
        w2 = torch.einsum("ijkl,jr,ip->prkl", t, b, a)
        made = torch.kron(w1, w2.contiguous().flatten(1)).view(shape)
        return {"lokr_w1": w1, "lokr_t2": t, "lokr_w2_a": a, "lokr_w2_b": b} | alpha, 2.5 * made, None
    if case == "difference":
        values = normal(*shape)
        return {"diff": values}, values, None
    b, a = factors(shape, random, rank)
    parts = {"lora_up.weight": b, "lora_down.weight": a, "scalar": torch.tensor(0.7)} | alpha
    wanted = {"dora": norms(torch.ones(shape), False), "dora of inputs": norms(torch.ones(shape), True)}.get(case)
    if wanted is not None:
        wanted = 1 + torch.rand(wanted.shape, generator=random)
        parts["dora_scale"] = wanted
    return parts, 0.7 * 2.5 * product(b, a, shape), wanted


LINEAR, CONV = f"{BLOCK}.ff.net.0.proj", "down_blocks.0.resnets.1.conv1"
CASES = ["scalar", "dora", "dora of inputs", "loha", "lokr", "lokr factors", "difference"]
OF_CONV = ["core", "loha core", "lokr core"]


@pytest.mark.parametrize(
    ("layer", "case"), [(n, c) for n in (LINEAR, CONV) for c in CASES] + [(CONV, c) for c in OF_CONV]
)
def test_lycoris(tmp_path: Path, random: torch.Generator, layer: str, case: str) -> None:
    """On a component by itself; a bias is changed beside."""
    shape = UNET[layer]
    base = {
        f"{layer}.weight": torch.randn(shape, generator=random),
        f"{layer}.bias": torch.randn(shape[0], generator=random),
    }
    parts, made, wanted = lycoris(case, shape, random)
    bias = torch.randn(shape[0], generator=random)
    save_file(base, tmp_path / "base.safetensors")
    save_file(
        {f"{flat(layer)}.{part}": value for part, value in {**parts, "diff_b": bias}.items()},
        tmp_path / "l.safetensors",
    )
    changed = base[f"{layer}.weight"] + made
    if wanted is not None:
        changed = changed * wanted / norms(changed, case == "dora of inputs")
    check(
        tmp_path / "base.safetensors",
        tmp_path / "l.safetensors",
        {f"{layer}.weight": changed, f"{layer}.bias": base[f"{layer}.bias"] + bias},
    )


def test_norm_layers(tmp_path: Path, random: torch.Generator) -> None:
    base = {f"norm.{end}": torch.randn(6, generator=random) for end in ("weight", "bias")}
    save_file(base, tmp_path / "base.safetensors")
    save_file(
        {"lycoris_norm.w_norm": torch.ones(6), "lycoris_norm.b_norm": 2 * torch.ones(6)}, tmp_path / "l.safetensors"
    )
    check(
        tmp_path / "base.safetensors",
        tmp_path / "l.safetensors",
        {"norm.weight": base["norm.weight"] + 1, "norm.bias": base["norm.bias"] + 2},
    )


def test_settings_in_the_header(tmp_path: Path, random: torch.Generator) -> None:
    """diffusers writes PEFT's settings there, after the name of the component."""
    base, names, adapter = {}, ["to_q", "to_k"], {}
    for name in names:
        base[f"unet/{name}.weight"] = torch.randn(8, 8, generator=random)
        base[f"unet/{name}.bias"] = torch.randn(8, generator=random)
        b, a = factors((8, 8), random, 4)
        adapter |= {f"unet.{name}.lora_A.weight": a, f"unet.{name}.lora_B.weight": b}
    settings = {
        "unet.lora_alpha": 6,
        "unet.use_rslora": True,
        "unet.alpha_pattern": {"to_k": 3},
        "text_encoder.lora_alpha": 9,
    }
    lora = tmp_path / "lora"
    lora.mkdir()
    save_file(
        adapter, lora / "pytorch_lora_weights.safetensors", metadata={"lora_adapter_metadata": json.dumps(settings)}
    )
    expected = dict(base)
    for name, alpha in zip(names, (6, 3), strict=True):
        b, a = adapter[f"unet.{name}.lora_B.weight"], adapter[f"unet.{name}.lora_A.weight"]
        expected[f"unet/{name}.weight"] = base[f"unet/{name}.weight"] + alpha / 2 * b @ a
    text = {"text_encoder/x.weight": torch.ones(2)}
    check(pipeline(tmp_path / "base", base | text), lora, expected | text)


def test_attention_in_one_tensor(tmp_path: Path, random: torch.Generator) -> None:
    """The second text encoder of a single file has the names of open_clip, its q, k and v in one tensor."""
    inner = "conditioner.embedders.1.model.transformer.resblocks.0."
    base = {
        f"{inner}attn.in_proj_weight": torch.randn(12, 4, generator=random),
        f"{inner}mlp.c_fc.weight": torch.randn(8, 4, generator=random),
    }
    save_file(base, tmp_path / "base.safetensors")
    start, adapter, expected = "lora_te2_text_model_encoder_layers_0_", {}, {n: v.clone() for n, v in base.items()}
    for name, rows in (("self_attn_k_proj", slice(4, 8)), ("self_attn_v_proj", slice(8, 12)), ("mlp_fc1", None)):
        b, a = factors((8 if rows is None else 4, 4), random)
        adapter |= {f"{start}{name}.lora_up.weight": b, f"{start}{name}.lora_down.weight": a}
        target = f"{inner}mlp.c_fc.weight" if rows is None else f"{inner}attn.in_proj_weight"
        expected[target][rows or slice(None)] += b @ a
    save_file(adapter, tmp_path / "l.safetensors")
    check(tmp_path / "base.safetensors", tmp_path / "l.safetensors", expected)


def test_the_bases_names_say_what_an_underscore_is(tmp_path: Path, random: torch.Generator) -> None:
    """`a_b.c` and `a.b_c` are one name with underscores: shapes tell them apart, or nothing does."""
    base = {"a_b.c.weight": torch.zeros(4, 4), "a.b_c.weight": torch.zeros(6, 4)}
    b, a = factors((6, 4), random)
    adapter = {"lora_unet_a_b_c.lora_up.weight": b, "lora_unet_a_b_c.lora_down.weight": a}
    save_file(base, tmp_path / "base.safetensors")
    save_file(adapter, tmp_path / "l.safetensors")
    check(tmp_path / "base.safetensors", tmp_path / "l.safetensors", base | {"a.b_c.weight": b @ a})
    save_file({"a_b.c.weight": torch.zeros(6, 4), "a.b_c.weight": torch.zeros(6, 4)}, tmp_path / "base.safetensors")
    with pytest.raises(ModelError, match=r"a_b_c: it may mean 'a(_b\.c|\.b_c)\.weight' or"):
        folded(tmp_path / "base.safetensors", tmp_path / "l.safetensors")


B, A = torch.ones(8, 2), torch.ones(2, 8)
UP, DOWN = "lora_unet_to_q.lora_up.weight", "lora_unet_to_q.lora_down.weight"
REFUSED = {
    "no such layer": (
        {UP: B, DOWN: A, "lora_te_x.lora_up.weight": B, "lora_te_x.lora_down.weight": A},
        "1 of 2 layers fit nothing: lora_te_x: the base has no"),
    "another shape": (
        {UP: torch.ones(6, 2), DOWN: A}, r"lora_unet_to_q: it changes \[6, 8\], base has 'to_q.weight' \[8, 8\]"),
    "half": ({UP: B}, "lora_unet_to_q: A is missing"),
    "alpha alone": ({"lora_unet_to_q.alpha": torch.tensor(1.0)}, "no change of one kind"),
    "two kinds": ({UP: B, DOWN: A, "lora_unet_to_q.diff": torch.ones(8, 8)}, "no change of one kind"),
    "OFT": ({"lora_unet_to_q.oft_blocks": torch.ones(2, 4, 4)}, r"lora_unet_to_q\.oft_blocks: a part that is not read"),
    "GLoRA": ({"lora_unet_to_q.a1.weight": A}, r"a1\.weight: a part that is not read"),
    "a bias of B": ({UP: B, DOWN: A, "lora_unet_to_q.lora_up.bias": torch.ones(8)}, r"lora_up\.bias: a part"),
    "an endless scale": ({UP: B, DOWN: A, "lora_unet_to_q.alpha": torch.tensor(math.inf)}, "its scale is inf"),
    "two numbers": ({UP: B, DOWN: A, "lora_unet_to_q.alpha": torch.ones(2)}, "instead of one number"),
    "integers": ({UP: B.int(), DOWN: A}, "I32 instead of floats"),
    "two layers on one": (
        {UP: B, DOWN: A, UP.replace("unet", "te"): B, DOWN.replace("unet", "te"): A}, "changed twice"),
    "other norms": ({UP: B, DOWN: A, "lora_unet_to_q.dora_scale": torch.ones(3, 1)}, r"norms \[3, 1\] do not fit"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(tmp_path: Path, case: str) -> None:
    tensors, says = REFUSED[case]
    save_file({"to_q.weight": torch.zeros(8, 8), "to_k.weight": torch.zeros(8, 8)}, tmp_path / "base.safetensors")
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, tmp_path / "l.safetensors")
    with pytest.raises(ModelError, match=says):
        folded(tmp_path / "base.safetensors", tmp_path / "l.safetensors")


def test_in_recipes_and_commands(tmp_path: Path, random: torch.Generator, cli: Cli) -> None:
    tensors = weights(random)
    base, file = pipeline(tmp_path / "base", tensors), tmp_path / "lora.safetensors"
    b, a = factors((8, 8), random)
    key = flat(f"{BLOCK}.attn1.to_q")
    save_file({f"{key}.lora_up.weight": b, f"{key}.lora_down.weight": a}, file)
    name = f"unet/{BLOCK}.attn1.to_q.weight"
    assert cli("adapters", "fold", file, "--base", base, "--out", tmp_path / "folded")[0] == 0
    torch.testing.assert_close(open_model(str(tmp_path / "folded")).state_dict()[name], tensors[name] + b @ a)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"merge_method: linear\nmodels: [{{model: {base}+{file}}}, {{model: {base}}}]\nparameters: {{weight: 0.5}}\n"
    )
    assert cli("merge", recipe, "--out", tmp_path / "merged")[0] == 0
    torch.testing.assert_close(open_model(str(tmp_path / "merged")).state_dict()[name], tensors[name] + b @ a / 2)
    code, _, err = cli("inspect", file)
    assert code == 3 and f"name its base: BASE+{file}" in err


def test_the_numbers_of_blocks() -> None:
    """Stable Diffusion's 1 to 12, as its published conversion has them."""
    known = {
        "input_blocks_1_0_in_layers_0": "down_blocks_0_resnets_0_norm1",
        "input_blocks_3_0_op": "down_blocks_0_downsamplers_0_conv",
        "input_blocks_8_1_proj_in": "down_blocks_2_attentions_1_proj_in",
        "middle_block_0_emb_layers_1": "mid_block_resnets_0_time_emb_proj",
        "middle_block_1_proj_out": "mid_block_attentions_0_proj_out",
        "middle_block_2_out_layers_3": "mid_block_resnets_1_conv2",
        "output_blocks_2_1_conv": "up_blocks_0_upsamplers_0_conv",
        "output_blocks_5_2_conv": "up_blocks_1_upsamplers_0_conv",
        "output_blocks_11_1_norm": "up_blocks_3_attentions_2_norm",
        "output_blocks_0_0_skip_connection": "up_blocks_0_resnets_0_conv_shortcut",
        "time_embed_2": "time_embedding_linear_2",
        "label_emb_0_0": "add_embedding_linear_1",
    }
    assert {key: in_diffusers(key, 2) for key in known} == known
    assert layers_of(["input_blocks_2_0_op", "input_blocks_4_0_op"]) == 1
    assert layers_of(["down_blocks_0_resnets_0_conv1", "down_blocks_0_resnets_1_conv1"]) == 2
    assert in_diffusers("double_blocks_0_img_mod_lin", 2) is None
