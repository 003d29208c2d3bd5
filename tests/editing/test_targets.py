"""Neurons are where the model's own code has them: found by name and shape, held against what the code computes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from models import read_model, write_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mergebench.checkpoint.header import TensorInfo
from mergebench.deltas.open import open_model
from mergebench.editing.targets import ROLES, Target, choose_layers, describe, find_targets
from mergebench.errors import ModelError, RecipeError

WIDTH, INNER = 16, 24
SIZES = {"vocab_size": 48, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = SIZES | {
    "intermediate_size": INNER, "num_key_value_heads": 1, "max_position_embeddings": 32, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
BERT = SIZES | {"intermediate_size": INNER, "max_position_embeddings": 32}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 8}
VISION = {key: value for key, value in BERT.items() if "vocab" not in key and "position" not in key} | {
    "image_size": 8, "patch_size": 4
}  # fmt: skip
GPT = {"vocab_size": 48, "n_positions": 32, "n_embd": WIDTH, "n_layer": 2, "n_head": 2, "bos_token_id": 1}
T5 = {"vocab_size": 48, "d_model": WIDTH, "d_kv": 8, "d_ff": INNER, "num_layers": 2, "num_heads": 2}
BART = {
    "vocab_size": 48, "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": INNER, "decoder_ffn_dim": INNER, "max_position_embeddings": 32,
}  # fmt: skip

# Config class, its settings, and how many neurons go into activation functions, in all layers and experts.
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "llama": ("Llama", LLAMA, 2 * INNER),
    "llama-square": ("Llama", LLAMA | {"intermediate_size": WIDTH}, 2 * WIDTH),
    "gemma2": ("Gemma2", LLAMA | {"head_dim": 8}, 2 * INNER),
    "olmo2": ("Olmo2", LLAMA, 2 * INNER),
    "stablelm": ("StableLm", LLAMA, 2 * INNER),
    "phi3": ("Phi3", LLAMA, 2 * INNER),
    "glm4": ("Glm4", LLAMA | {"head_dim": 8}, 2 * INNER),
    "nemotron": ("Nemotron", LLAMA, 2 * INNER),
    "phi": ("Phi", LLAMA, 2 * INNER),
    "starcoder2": ("Starcoder2", LLAMA, 2 * INNER),
    "persimmon": ("Persimmon", LLAMA, 2 * INNER),
    "gpt-neox": ("GPTNeoX", BERT, 2 * INNER),
    "falcon": ("Falcon", SIZES | {"ffn_hidden_size": INNER}, 2 * INNER),
    "bloom": ("Bloom", {"vocab_size": 48, "hidden_size": WIDTH, "n_layer": 2, "n_head": 2}, 2 * 4 * WIDTH),
    "opt": ("OPT", LLAMA | {"ffn_dim": INNER, "word_embed_proj_dim": WIDTH}, 2 * INNER),
    "gpt2": ("GPT2", GPT | {"n_inner": INNER}, 2 * INNER),
    "gpt2-square": ("GPT2", GPT | {"n_inner": WIDTH}, 2 * WIDTH),
    "gptj": ("GPTJ", GPT | {"n_inner": INNER, "rotary_dim": 4}, 2 * INNER),
    "gpt-bigcode": ("GPTBigCode", GPT | {"n_inner": WIDTH}, 2 * WIDTH),
    "mpt": ("Mpt", {"vocab_size": 48, "d_model": WIDTH, "n_layers": 2, "n_heads": 2}, 2 * 4 * WIDTH),
    "mixtral": ("Mixtral", LLAMA | {"num_local_experts": 3}, 2 * 3 * INNER),
    "qwen2-moe": (
        "Qwen2Moe",
        LLAMA | EXPERTS | {"num_experts": 3, "shared_expert_intermediate_size": 12, "mlp_only_layers": [0]},
        INNER + 3 * 8 + 12,
    ),
    "deepseek-v3": (
        "DeepseekV3",
        LLAMA | EXPERTS | {
            "num_key_value_heads": 2, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
            "n_shared_experts": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
        INNER + 4 * 8 + 8,
    ),
    "gpt-oss": ("GptOss", LLAMA | {"num_local_experts": 3, "head_dim": 8, "num_experts_per_tok": 2}, 2 * 3 * INNER),
    "gpt-oss-square": (
        "GptOss",
        LLAMA | {"num_local_experts": 3, "head_dim": 8, "num_experts_per_tok": 2, "intermediate_size": WIDTH // 2},
        2 * 3 * WIDTH // 2,
    ),
    "granite-moe": ("GraniteMoe", LLAMA | {"num_local_experts": 3}, 2 * 3 * INNER),
    "jetmoe": ("JetMoe", LLAMA | {"kv_channels": 8, "num_local_experts": 3, "num_experts_per_tok": 3}, 2 * 3 * INNER),
    "dbrx": (
        "Dbrx",
        {
            "vocab_size": 48, "d_model": WIDTH, "n_layers": 2, "n_heads": 2, "max_seq_len": 32,
            "attn_config": {"kv_n_heads": 1, "rope_theta": 10000.0, "clip_qkv": 9.0},
            "ffn_config": {"ffn_hidden_size": INNER, "moe_num_experts": 3, "moe_top_k": 2, "hidden_size": WIDTH},
        },
        2 * 3 * INNER,
    ),
    "bert": ("Bert", BERT, 2 * INNER),
    "distilbert": (
        "DistilBert", {"vocab_size": 48, "dim": WIDTH, "hidden_dim": INNER, "n_layers": 2, "n_heads": 2}, 2 * INNER
    ),
    "albert": ("Albert", BERT | {"embedding_size": 8}, INNER),
    "deberta": ("DebertaV2", BERT, 2 * INNER),
    "modernbert": ("ModernBert", BERT | {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2}, 2 * INNER),
    "xlnet": ("XLNet", {"vocab_size": 48, "d_model": WIDTH, "d_inner": INNER, "n_layer": 2, "n_head": 2}, 2 * INNER),
    "vit": ("ViT", VISION, 2 * INNER),
    "dinov2-swiglu": ("Dinov2", VISION | {"use_swiglu_ffn": True, "mlp_ratio": 3}, 2 * 32),
    "t5": ("T5", T5, 4 * INNER),
    "t5-gated": ("T5", T5 | {"feed_forward_proj": "gated-gelu"}, 4 * INNER),
    "bart": ("Bart", BART, 4 * INNER),
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


class Call(NamedTuple):
    """What an activation function was given: the path of the module that called it, and the tensor."""

    where: str
    given: Tensor


class Watch(TorchFunctionMode):
    """Everything that goes into an activation function, whoever calls it."""

    NAMES = ("silu", "gelu", "relu", "sigmoid", "tanh", "erf")

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._path = [""]
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda *_, name=name: self._path.append(name))
            module.register_forward_hook(lambda *_: (self._path.pop(), None)[1])

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") in self.NAMES and args[0].dim() > 1:
            self.calls.append(Call(self._path[-1], args[0].detach().reshape(-1, args[0].shape[-1]).clone()))
        return function(*args, **(kwargs or {}))


class Zoo:
    """Tiny models on disk, one of each kind, made once."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._made = folder, dict[str, Path]()

    def path(self, name: str) -> Path:
        if name not in self._made:
            kind, settings, _ = MODELS[name]
            torch.manual_seed(0)
            config = getattr(transformers, f"{kind}Config")(**copy.deepcopy(settings))
            model = transformers.AutoModel.from_config(config)
            with torch.no_grad():
                for value in model.parameters():
                    value.copy_(torch.randn_like(value) * 0.3 + (value.dim() == 1))
            model.save_pretrained(self._folder / name)
            self._made[name] = self._folder / name
        return self._made[name]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zoo]:
    transformers.utils.logging.disable_progress_bar()
    yield Zoo(tmp_path_factory.mktemp("zoo"))
    transformers.utils.logging.enable_progress_bar()


def load(path: Path) -> torch.nn.Module:
    return transformers.AutoModel.from_pretrained(path, experts_implementation="eager").eval()


def run(model: torch.nn.Module) -> tuple[list[Call], Tensor]:
    """One batch through a model: what went into activation functions, and what came out."""
    if model.main_input_name == "pixel_values":
        inputs = {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))}
    else:
        ids = torch.randint(3, 48, (2, 12), generator=torch.Generator().manual_seed(1))
        inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})
    with torch.no_grad(), Watch(model) as watch:
        return watch.calls, model(**inputs)[0]


def found(path: Path, role: str, layers: str | None = None) -> list[Target]:
    model = open_model(str(path))
    return find_targets(model.tensors, model.config, role, None, layers)


def change(path: Path, out: Path, target: Target, number: int, by: Callable[[Tensor], Tensor]) -> Path:
    """The model with one neuron's vector changed."""
    tensors = load_file(path / "model.safetensors")
    matrix = tensors[target.tensor]
    expert, row = divmod(number, matrix.shape[-1 if target.transposed else -2])
    matrix = matrix[expert] if matrix.dim() == 3 else matrix
    vector = matrix[:, row] if target.transposed else matrix[row]
    assert vector.shape == (WIDTH,)
    vector.copy_(by(vector))
    out.mkdir()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_bytes((path / "config.json").read_bytes())
    return out


@pytest.mark.parametrize("name", MODELS)
def test_a_gates_neuron_changes_its_own_pre_activation_alone(name: str, zoo: Zoo, tmp_path: Path) -> None:
    """No name of the model's is looked at: the code itself says what the neuron does. (Dbrx has its experts' rows one
    after the other, a call each.)"""
    path = zoo.path(name)
    targets = found(path, "gate_proj")
    assert sum(len(target.numbers) for target in targets) == MODELS[name][2]
    before, _ = run(load(path))
    random = torch.Generator().manual_seed(2)
    for place, target in enumerate((targets[0], targets[len(targets) // 2], targets[-1])):
        numbers = list(range(target.first, target.stop, target.step))
        where = int(torch.randint(len(numbers), (), generator=random))
        changed = change(path, tmp_path / str(place), target, numbers[where], lambda vector: vector * 1.5 + 0.5)
        after, _ = run(load(changed))
        assert len(before) == len(after)
        first = next(k for k, (old, new) in enumerate(zip(before, after, strict=True)) if not same(old, new))
        old, new = before[first], after[first]
        columns = (old.given != new.given).any(0).nonzero().ravel().tolist()
        assert columns == [where % old.given.shape[1]], f"{target} number {where}: {old.where} saw columns {columns}"
        assert f".{target.layer}." in f".{old.where}.", f"{target}: first seen in {old.where}"


def same(old: Call, new: Call) -> bool:
    return old.given.shape == new.given.shape and torch.equal(old.given, new.given)


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe", "gpt-oss"])
def test_experts_are_numbered_through(name: str, zoo: Zoo, tmp_path: Path) -> None:
    """The last layer's experts are called in their order; the neuron of each is seen in its own call."""
    path = zoo.path(name)
    experts = [target for target in found(path, "gate_proj", "1") if "experts" in target.tensor]
    before, _ = run(load(path))
    seen = []
    for place, target in enumerate(experts):
        number = target.first + 2 * target.step
        changed = change(path, tmp_path / str(place), target, number, lambda vector: vector * 1.5 + 0.5)
        after, _ = run(load(changed))
        seen.append(next(k for k, (old, new) in enumerate(zip(before, after, strict=True)) if not same(old, new)))
    assert len(seen) == 3
    assert seen == sorted(set(seen))


@pytest.mark.parametrize(
    ("name", "reads", "writes"),
    [
        ("llama", "up_proj", "down_proj"),
        ("llama-square", "up_proj", "down_proj"),
        ("phi3", "up_proj", "down_proj"),
        ("glm4", "up_proj", "down_proj"),
        ("modernbert", "up_proj", "down_proj"),
        ("mixtral", "up_proj", "down_proj"),
        ("dbrx", "up_proj", "down_proj"),
        ("t5-gated", "up_proj", "down_proj"),
    ],
)
def test_what_a_unit_writes_is_a_factor_of_what_it_reads(
    name: str, reads: str, writes: str, zoo: Zoo, tmp_path: Path
) -> None:
    """down(act(gate x) * up x): three times the vector that a unit writes equals three times its row of up."""
    path = zoo.path(name)
    up, down = found(path, reads)[-1], found(path, writes)[-1]
    assert len(up.numbers) == len(down.numbers)
    models = [
        load(change(path, tmp_path / role, target, target.first + 5, lambda vector: vector * 3))
        for role, target in (("up", up), ("down", down))
    ]
    (_, first), (_, second) = map(run, models)
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(first, run(load(path))[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["phi3", "gpt-oss", "granite-moe", "modernbert", "jetmoe"])
def test_gate_and_up_share_a_tensor(name: str, zoo: Zoo) -> None:
    both = found(zoo.path(name), "gate_proj") + found(zoo.path(name), "up_proj")
    for tensor, info in open_model(str(zoo.path(name))).tensors.items():
        numbers = [n for one in both if one.tensor == tensor for n in range(one.first, one.stop, one.step)]
        assert sorted(numbers) in ([], list(range(info.numel // WIDTH)))


@pytest.mark.parametrize("name", ["bert", "opt", "t5", "vit", "deberta"])
def test_the_heads_vectors_too(name: str, zoo: Zoo, tmp_path: Path) -> None:
    """What a head adds up are v's: v's row and o's column trade factors where v has no bias."""
    tensors = read_model(zoo.path(name))
    for target in found(zoo.path(name), "v_proj"):
        tensors.get(target.tensor.replace(".weight", ".bias"), torch.zeros(1)).zero_()
    config = json.loads((zoo.path(name) / "config.json").read_text())
    path = write_model(tmp_path / "model", tensors, config=config, metadata={"format": "pt"})
    value, out = found(path, "v_proj")[-1], found(path, "o_proj")[-1]
    models = [
        load(change(path, tmp_path / role, target, 5, lambda vector: vector * 3))
        for role, target in (("v", value), ("o", out))
    ]
    (_, first), (_, second) = map(run, models)
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(first, run(load(path))[1], rtol=1e-3, atol=1e-4)


def infos(shapes: Mapping[str, tuple[int, ...]], dtype: str = "BF16") -> dict[str, TensorInfo]:
    return {name: TensorInfo(name, dtype, shape, Path("x"), 0, 0) for name, shape in shapes.items()}


def mlp(prefix: str, names: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")) -> dict[str, tuple[int, ...]]:
    sides = dict.fromkeys(names[:-1], (INNER, WIDTH)) | {names[-1]: (WIDTH, INNER)}
    return {f"{prefix}.{name}.weight": side for name, side in sides.items()}


DENSE = {name: shape for layer in range(12) for name, shape in mlp(f"model.layers.{layer}.mlp").items()} | {
    "model.embed_tokens.weight": (48, WIDTH), "model.norm.weight": (WIDTH,), "lm_head.weight": (48, WIDTH),
    "model.layers.0.self_attn.q_proj.weight": (WIDTH, WIDTH), "model.layers.0.mlp.gate.weight": (4, WIDTH),
}  # fmt: skip


def test_the_order_is_that_of_layers_and_experts_not_of_files() -> None:
    """Layer 10 after layer 2, expert 10 after expert 2; however the files have them."""
    shapes = DENSE | {
        name: shape
        for expert in (10, 2, 0)
        for name, shape in mlp(f"model.layers.3.mlp.experts.{expert}", ("w1", "w3", "w2")).items()
    }
    orders = [list(shapes), list(reversed(shapes)), sorted(shapes)]
    lists = [
        find_targets(infos({name: shapes[name] for name in order}), {}, "gate_proj", WIDTH, None) for order in orders
    ]
    assert lists[0] == lists[1] == lists[2]
    assert [target.layer for target in lists[0]] == [0, 1, 2, 3, 3, 3, 3, *range(4, 12)]
    experts = [target.tensor for target in lists[0] if target.layer == 3]
    assert [".experts.0." in experts[1], ".experts.2." in experts[2], ".experts.10." in experts[3]] == [True] * 3


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (None, range(12)), ("all", range(12)), ("0-3", range(4)), ("3,5,7", [3, 5, 7]), ("!0-7", range(8, 12)),
        ("-1", [11]), ("-4--2", [8, 9, 10]), ("0-1,-1", [0, 1, 11]), ("!1,3-11", [0, 2]), ("8 - 11", range(8, 12)),
    ],
)  # fmt: skip
def test_layers(written: str | None, expected: Any) -> None:
    targets = find_targets(infos(DENSE), {}, "gate_proj", WIDTH, written)
    assert [target.layer for target in targets] == list(expected)


@pytest.mark.parametrize("written", ["12", "0-12", "-13", "x", "", "1..3", "5-3", "!0-11", "!"])
def test_layers_that_are_none(written: str) -> None:
    with pytest.raises(RecipeError, match=r"^layers: "):
        choose_layers(written, set(range(12)))


def test_a_range_may_hold_layers_without_the_role() -> None:
    assert choose_layers("0-4", {1, 3, 5}) == {1, 3}
    with pytest.raises(RecipeError, match="no such layers") as error:
        choose_layers("2", {0, 1, 3})
    assert error.value.hint == "the candidates are in layers 0-1, 3"


def test_the_width_is_the_text_models() -> None:
    """A vision tower's matrices are no candidates of a text probe, even where they are as wide."""
    shapes = mlp("model.language_model.layers.0.mlp") | mlp("model.visual.blocks.0.mlp", ("fc1", "fc2"))
    config = {"text_config": {"hidden_size": WIDTH}, "vision_config": {"hidden_size": WIDTH}}
    (target,) = find_targets(infos(shapes), config, "gate_proj", None, None)
    assert target.tensor == "model.language_model.layers.0.mlp.gate_proj.weight"
    shapes = mlp("model.layers.0.mlp") | mlp("visual.blocks.0.mlp", ("fc1", "fc2"))
    (target,) = find_targets(infos(shapes), {}, "gate_proj", WIDTH, None)
    assert target.tensor == "model.layers.0.mlp.gate_proj.weight"
    (target,) = find_targets(infos(mlp("visual.blocks.0.mlp", ("fc1", "fc2"))), {}, "gate_proj", WIDTH, None)
    assert target.role == "up_proj"

    shapes = mlp("model.language_model.layers.0.mlp") | mlp("model.diffusion_head.layers.0.ffn")
    (target,) = find_targets(infos(shapes), {}, "gate_proj", WIDTH, None)
    assert target.tensor == "model.language_model.layers.0.mlp.gate_proj.weight"


def test_a_matrix_that_gives_what_is_as_wide_does_not_read_it() -> None:
    """A tower whose inner width is the text model's width."""
    shapes = mlp("layers.0.mlp") | {"tower.0.fc1.weight": (WIDTH, 4), "tower.0.fc2.weight": (4, WIDTH)}
    (target,) = find_targets(infos(shapes), {}, "gate_proj", WIDTH, None)
    assert target.tensor == "layers.0.mlp.gate_proj.weight"


def test_a_glob_takes_whole_matrices_of_the_layers() -> None:
    targets = find_targets(infos(DENSE), {}, "*.layers.1.mlp.*_proj.weight", WIDTH, None)
    assert [(target.tensor.split(".")[-2], len(target.numbers), target.transposed) for target in targets] == [
        ("down_proj", INNER, True), ("gate_proj", INNER, False), ("up_proj", INNER, False)
    ]  # fmt: skip


def test_a_square_matrix_under_a_glob_lies_as_its_role_says() -> None:
    square = dict.fromkeys(mlp("h.0.mlp", ("c_fc", "c_proj")), (WIDTH, WIDTH))
    for model_type, expected in (("gpt2", [True, False]), ("starcoder2", [False, True])):
        targets = find_targets(infos(square), {"model_type": model_type}, "h.*", WIDTH, None)
        assert [target.transposed for target in targets] == expected


@pytest.mark.parametrize(
    ("role", "error", "what"),
    [
        ("gate", RecipeError, "target: 'gate' matches no matrix"),
        ("*.nothing.*", RecipeError, "target: '*.nothing.*' matches no matrix"),
        ("*norm*", RecipeError, "target: '*norm*' matches no matrix"),
        ("lm_head.weight", RecipeError, "target: 'lm_head.weight' matches no matrix"),
        ("o_proj", ModelError, "target: no o_proj is told by its name in this model"),
    ],
)
def test_a_target_that_is_not_there(role: str, error: type[Exception], what: str) -> None:
    with pytest.raises(error) as raised:
        find_targets(infos(DENSE), {}, role, WIDTH, None)
    assert str(raised.value) == what
    hint = raised.value.hint  # type: ignore[attr-defined]
    assert hint == "did you mean 'gate_proj'?" if role == "gate" else "model.layers.*.mlp.gate_proj.weight" in hint


def test_a_probe_of_another_width() -> None:
    with pytest.raises(ModelError, match=r"gate_proj.weight is \[24, 16\]: it has no neurons of width 64"):
        find_targets(infos(DENSE), {}, "gate_proj", 64, None)
    with pytest.raises(ModelError, match="does not say how wide"):
        find_targets(infos(DENSE), {}, "gate_proj", None, None)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "I8", "U8"])
def test_types_that_cannot_be_edited(dtype: str) -> None:
    with pytest.raises(ModelError, match=f"its type {dtype} cannot be edited"):
        find_targets(infos(DENSE, dtype), {}, "gate_proj", WIDTH, None)


def test_what_is_printed(zoo: Zoo) -> None:
    lines = {name: describe("gate_proj", found(zoo.path(name), "gate_proj")) for name in ("llama", "gpt2", "qwen2-moe")}
    assert lines["llama"] == ["layers.N.mlp.gate_proj.weight: 48 rows in 2 layers"]
    fallback = " (no gate there: what the activation function takes)"
    assert lines["gpt2"] == [f"h.N.mlp.c_fc.weight: 48 columns in 2 layers{fallback}"]
    assert lines["qwen2-moe"] == [
        "layers.N.mlp.gate_proj.weight: 24 rows in 1 layer",
        "layers.N.mlp.shared_expert.gate_proj.weight: 12 rows in 1 layer",
        "layers.N.mlp.experts.N.gate_proj.weight: 24 rows in 1 layer",
    ]
    assert describe("down_proj", found(zoo.path("llama"), "down_proj")) == [
        "layers.N.mlp.down_proj.weight: 48 columns in 2 layers"
    ]


@pytest.mark.parametrize(
    ("name", "outside", "inside"),
    [
        ("llama", {"embed_tokens"}, 2 * 2),
        ("gpt2", {"wte", "wpe"}, 2 * 2),
        ("gpt-neox", {"embed_in"}, 2 * 2),
        ("mixtral", {"embed_tokens"}, 2 * (1 + 3)),
        ("opt", {"embed_tokens", "embed_positions"}, 2 * 2),
    ],
)
def test_all_that_writes_to_the_residual_stream(name: str, outside: set[str], inside: int, zoo: Zoo) -> None:
    """The embeddings, no head, and of each layer the attention's output and every expert's."""
    targets = found(zoo.path(name), "residual")
    assert {target.tensor.split(".")[-2] for target in targets if target.layer < 0} == outside
    assert len([target for target in targets if target.layer >= 0]) == inside
    assert all(target.layer >= 0 for target in found(zoo.path(name), "residual", "0,1"))


def test_every_role_has_its_neurons(zoo: Zoo) -> None:
    counts = {role: sum(len(target.numbers) for target in found(zoo.path("llama"), role)) for role in ROLES}
    assert counts == dict(zip(ROLES, (48, 48, 48, 32, 16, 16, 32, 128), strict=True))
