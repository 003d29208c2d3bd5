"""Recipes that mergekit 0.1.5 was run with, and the tiny models it ran on; its results lie in mergekit.safetensors.

Made by benchmarks/make_golden_mergekit.py; the models come from seeds, so that only results are stored.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

WIDTH, INNER, LAYERS, WORDS = 16, 24, 4, 40
MODELS = ("base", "ft1", "ft2", "ft3")
HYBRIDS = ("hybrid1", "hybrid2")  # convolutions and attention in turn
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": WORDS,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}

HYBRID = CONFIG | {
    "architectures": ["Lfm2ForCausalLM"],
    "model_type": "lfm2",
    "layer_types": ["conv", "full_attention"] * (LAYERS // 2),
    "block_auto_adjust_ff_dim": False,
    "conv_L_cache": 3,
    "norm_eps": 1e-6,
    "tie_word_embeddings": True,
}


def shapes() -> dict[str, tuple[int, ...]]:
    """The tensors of a tiny Llama, by name."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (WORDS, WIDTH)}
    for layer in range(LAYERS):
        start = f"model.layers.{layer}."
        found[start + "self_attn.q_proj.weight"] = (16, WIDTH)
        found[start + "self_attn.k_proj.weight"] = (8, WIDTH)
        found[start + "self_attn.v_proj.weight"] = (8, WIDTH)
        found[start + "self_attn.o_proj.weight"] = (WIDTH, 16)
        found[start + "mlp.gate_proj.weight"] = (INNER, WIDTH)
        found[start + "mlp.up_proj.weight"] = (INNER, WIDTH)
        found[start + "mlp.down_proj.weight"] = (WIDTH, INNER)
        found[start + "input_layernorm.weight"] = (WIDTH,)
        found[start + "post_attention_layernorm.weight"] = (WIDTH,)
    return found | {"model.norm.weight": (WIDTH,), "lm_head.weight": (WORDS, WIDTH)}


def hybrid_shapes() -> dict[str, tuple[int, ...]]:
    """The tensors of a tiny LFM2, by name."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (WORDS, WIDTH)}
    for layer in range(LAYERS):
        start = f"model.layers.{layer}."
        if layer % 2:
            for name, rows in (("q", 16), ("k", 8), ("v", 8), ("out", WIDTH)):
                found[f"{start}self_attn.{name}_proj.weight"] = (rows, WIDTH)
            found |= {f"{start}self_attn.{name}_layernorm.weight": (8,) for name in "qk"}
        else:
            found[start + "conv.conv.weight"] = (WIDTH, 1, 3)
            found[start + "conv.in_proj.weight"] = (3 * WIDTH, WIDTH)
            found[start + "conv.out_proj.weight"] = (WIDTH, WIDTH)
        found |= {f"{start}feed_forward.{name}.weight": (INNER, WIDTH) for name in ("w1", "w3")}
        found[start + "feed_forward.w2.weight"] = (WIDTH, INNER)
        found |= {f"{start}{name}_norm.weight": (WIDTH,) for name in ("operator", "ffn")}
    return found | {"model.embedding_norm.weight": (WIDTH,)}


def tensors(model: str) -> dict[str, NDArray[np.float32]]:
    """A model's tensors: the base's from one seed, a fine-tune's a tenth as large a step away from it."""
    number = (MODELS + HYBRIDS).index(model)
    made = {}
    for place, (name, shape) in enumerate((hybrid_shapes() if model in HYBRIDS else shapes()).items()):
        base = np.random.Generator(np.random.PCG64([0, place])).standard_normal(shape).astype(np.float32)
        if number:
            step = np.random.Generator(np.random.PCG64([number, place])).standard_normal(shape).astype(np.float32)
            base = base + step * np.float32(0.1)
        made[name] = base
    return made


def write_models(folder: Path) -> None:
    """Put every model into `folder`, each in a directory of its own."""
    from safetensors.numpy import save_file

    for model in MODELS + HYBRIDS:
        (folder / model).mkdir(parents=True)
        save_file(tensors(model), folder / model / "model.safetensors", metadata={"format": "pt"})
        (folder / model / "config.json").write_text(
            json.dumps(HYBRID if model in HYBRIDS else CONFIG), encoding="utf-8"
        )


def _models(*entries: str) -> str:
    """`ft1 weight 0.5 density 0.3` as an entry of models:."""
    lines = ["models:"]
    for entry in entries:
        model, *rest = entry.split()
        given = ", ".join(f"{name}: {value}" for name, value in zip(rest[::2], rest[1::2], strict=True))
        lines.append(f"- {{model: {model}" + (f", parameters: {{{given}}}" if given else "") + "}")
    return "\n".join(lines) + "\n"


def _case(method: str, *entries: str, base: str | None = None, parameters: str = "", more: str = "") -> str:
    text = f"merge_method: {method}\ndtype: float32\n"
    text += f"base_model: {base}\n" if base else ""
    text += f"parameters: {{{parameters}}}\n" if parameters else ""
    return text + (_models(*entries) if entries else "") + more


THREE = ("ft1 weight 0.5", "ft2 weight 0.3", "ft3 weight 0.4")
TRIMMED = ("ft1 weight 0.5 density 0.3", "ft2 weight 1.0 density 0.5", "ft3 weight 0.5 density 0.3")
MOST = ("ft1 weight 0.5 density 0.9 gamma 0.3", "ft2 weight 0.7 density 1.0", "ft3 weight 0.5 density 0.004")
ROWS = "nuslerp_flatten: false, nuslerp_row_wise: true"
GRADIENT = (
    "{filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}, {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}, {value: 0.5}"
)
FILTERS = "{filter: o_proj, value: 0.25}, {filter: layers.1., value: 0}, {value: 1}"
NOTHING_OUT = "parameters: {scale: [{filter: o_proj, value: 0.0}, {value: 1.0}]}"

CASES = {
    # the methods
    "linear": _case("linear", *THREE),
    "linear-sum": _case("linear", *THREE, parameters="normalize: false"),
    "slerp": _case("slerp", "base", "ft2", base="base", parameters="t: 0.3"),
    "slerp-base-last": _case("slerp", "ft2", "ft1", base="ft1", parameters="t: 0.3"),
    "nuslerp": _case("nuslerp", "ft1 weight 0.3", "ft2 weight 0.9"),
    "nuslerp-base": _case("nuslerp", "ft1 weight 0.3", "ft2 weight 0.9", base="base"),
    "nuslerp-rows": _case("nuslerp", "ft1 weight 0.3", "ft2 weight 0.9", parameters=ROWS),
    "nuslerp-columns": _case("nuslerp", "ft1 weight 0.3", "ft2 weight 0.9", parameters="nuslerp_flatten: false"),
    "nuslerp-base-columns": _case("nuslerp", "ft1 weight 0.3", "ft2 weight 0.9", base="base", parameters=ROWS),
    "multislerp": _case("multislerp", *THREE),
    "multislerp-base": _case("multislerp", *THREE, base="base"),
    "multislerp-raw": _case("multislerp", *THREE, parameters="normalize_weights: false"),
    "karcher": _case("karcher", "ft1", "ft2", "ft3"),
    "karcher-base": _case("karcher", "ft1", "ft2", base="base"),
    "karcher-base-listed": _case("karcher", "ft1", "base", "ft3", base="base", parameters="tol: 1e-6"),
    "task_arithmetic": _case("task_arithmetic", *THREE, base="base", parameters="lambda: 0.7"),
    "task_arithmetic-mean": _case("task_arithmetic", *THREE, base="base", parameters="normalize: true"),
    "ties": _case("ties", *TRIMMED, base="base"),
    "ties-sum": _case("ties", *TRIMMED, base="base", parameters="normalize: false, lambda: 1.5"),
    "ties-negative": _case("ties", "ft1 weight 0.5 density 0.3", "ft2 weight -1.0 density 0.5", base="base"),
    "breadcrumbs": _case("breadcrumbs", *TRIMMED, base="base", parameters="gamma: 0.05"),
    "breadcrumbs-default": _case("breadcrumbs", *TRIMMED, base="base"),
    "breadcrumbs_ties": _case("breadcrumbs_ties", *TRIMMED, base="base", parameters="gamma: 0.05, lambda: 0.8"),
    "breadcrumbs-mean": _case("breadcrumbs", *MOST, base="base", parameters="normalize: true"),
    "breadcrumbs_ties-mean": _case("breadcrumbs_ties", *MOST, base="base", parameters="normalize: true"),
    "sce": _case("sce", "ft1", "ft2", "ft3", base="base", parameters="select_topk: 0.3"),
    "sce-all": _case("sce", "ft1", "ft2", "ft3", base="base"),
    "sce-two": _case("sce", "ft1", "ft3", base="base", parameters="select_topk: 0.75"),
    "ram": _case("ram", "ft1", "ft2", "ft3", base="base", parameters="epsilon: 0.08"),
    "ramplus_tl": _case("ramplus_tl", "ft1", "ft2", "ft3", base="base", parameters="epsilon: 0.08, r: 0.2, alpha: 0.3"),
    "model_stock": _case("model_stock", "ft1", "ft2", "ft3", base="base"),
    "model_stock-two": _case("model_stock", "ft1", "base", "ft3", base="base"),
    "model_stock-rows": _case("model_stock", "ft1", "ft2", "ft3", base="base", parameters="filter_wise: true"),
    "nearswap": _case("nearswap", "ft1", base="base", parameters="t: 0.05"),
    "arcee_fusion": _case("arcee_fusion", "ft1", base="base"),
    "passthrough": _case("passthrough", "ft2"),
    "passthrough-base": _case("passthrough", "ft2 scale 0.7", base="ft2"),
    "passthrough-scale": _case("passthrough", "ft2", parameters="scale: 0.5"),
    # the language
    "gradient": _case("slerp", "base", "ft2", base="base", parameters=f"t: [{GRADIENT}]"),
    "gradient-weights": _case("linear", "ft1 weight [0,1]", "ft2 weight [1,0.5,0]"),
    "filters": _case("linear", "ft1 weight 2", "ft2", parameters=f"weight: [{FILTERS}]"),
    "precedence": _case("task_arithmetic", "ft1 weight 0.5", "ft2", base="base", parameters="weight: 2.0"),
    "slices": _case(
        "slerp",
        base="base",
        parameters="t: [{filter: mlp, value: 0.2}, {value: 0.6}]",
        more="slices:\n- sources: [{model: base, layer_range: [0, 2]}, {model: ft1, layer_range: [0, 2]}]\n"
        "- sources: [{model: base, layer_range: [2, 4]}, {model: ft1, layer_range: [2, 4]}]\n"
        "  parameters: {t: [0.1, 0.9]}\n",
    ),
    "stack": _case(
        "passthrough",
        more="slices:\n- sources: [{model: ft1, layer_range: [0, 3]}]\n"
        f"- sources: [{{model: ft2, layer_range: [1, 4], {NOTHING_OUT}}}]\n",
    ),
    "shifted": _case(
        "linear",
        more="slices:\n- sources:\n  - {model: ft1, layer_range: [0, 2], parameters: {weight: 0.7}}\n"
        "  - {model: ft2, layer_range: [2, 4], parameters: {weight: 0.3}}\n",
    ),
    # layers of two kinds
    "hybrid": _case(
        "slerp",
        base="hybrid1",
        parameters="t: [{filter: feed_forward, value: [0, 0.3, 1]}, {value: 0.5}]",
        more="slices:\n- sources: [{model: hybrid1, layer_range: [0, 4]}, {model: hybrid2, layer_range: [0, 4]}]\n",
    ),
    "hybrid-halves": _case(
        "linear",
        more="slices:\n- sources:\n  - {model: hybrid1, layer_range: [0, 2], parameters: {weight: 0.7}}\n"
        "  - {model: hybrid2, layer_range: [0, 2], parameters: {weight: 0.3}}\n"
        "- sources:\n  - {model: hybrid1, layer_range: [2, 4], parameters: {weight: 0.7}}\n"
        "  - {model: hybrid2, layer_range: [2, 4], parameters: {weight: 0.3}}\n",
    ),
}  # fmt: skip
