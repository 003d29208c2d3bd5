"""Write synthetic checkpoints for benchmarks: OUT/base and OUT/ft1 … OUT/ftN (Llama shapes, no tokenizer).

    python benchmarks/make_models.py OUT --params 1.1b [--models 3] [--dtype bfloat16] [--shard-size 2GB] [--seed 0]

Base weights are normal(0, 0.02), norm weights near 1. A fine-tune is the base plus a small heavy-tailed task vector
(a part of it shared by all fine-tunes), rounded to the dtype: in bfloat16 a good third of the elements stay exactly
unchanged, as in real fine-tunes. Values come from random blocks that are used again at random offsets, and files are
written tile by tile, so a 7B set needs disk, not memory or patience.
"""

import argparse
import json
import re
import time
from pathlib import Path

import numpy as np
import torch

#        layers, hidden, intermediate, heads, kv heads, vocabulary
PRESETS = {
    "tiny": (2, 64, 176, 4, 2, 256),
    "0.12b": (12, 768, 2048, 12, 4, 32000),
    "0.55b": (18, 1536, 4096, 24, 8, 32000),
    "wide": (2, 4096, 14336, 32, 8, 32000),
    "1.1b": (22, 2048, 5632, 32, 4, 32000),
    "3b": (26, 3200, 8640, 32, 32, 32000),
    "7b": (32, 4096, 11008, 32, 32, 32000),
    "13b": (40, 5120, 13824, 40, 40, 32000),
    "70b": (80, 8192, 28672, 64, 8, 128256),
}
DTYPES = {
    "bfloat16": (torch.bfloat16, "BF16"),
    "float16": (torch.float16, "F16"),
    "float32": (torch.float32, "F32"),
}
TILE = 1 << 20
POOL = 1 << 22  # random values drawn once per stream; a tile is a slice of them
INIT = 0.02
DELTA = 1e-3  # spread of a task vector's large elements
SHARED = 0.3  # weight of the part that all fine-tunes share


def parse_size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f"not a size: {text!r} (for example 2GB, 500MB, 1GiB)")
    power = " KMGT".index(match[2].upper() or " ")
    size = int(float(match[1]) * (1024 if match[3] else 1000) ** power)
    if size <= 0:
        raise argparse.ArgumentTypeError("the shard size must be positive")
    return size


def shapes(preset: str) -> dict[str, tuple[int, ...]]:
    layers, hidden, inner, heads, kv, vocab = PRESETS[preset]
    kv_width = hidden // heads * kv
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(layers):
        p = f"model.layers.{i}."
        out[p + "input_layernorm.weight"] = (hidden,)
        out[p + "mlp.down_proj.weight"] = (hidden, inner)
        out[p + "mlp.gate_proj.weight"] = (inner, hidden)
        out[p + "mlp.up_proj.weight"] = (inner, hidden)
        out[p + "post_attention_layernorm.weight"] = (hidden,)
        out[p + "self_attn.k_proj.weight"] = (kv_width, hidden)
        out[p + "self_attn.o_proj.weight"] = (hidden, hidden)
        out[p + "self_attn.q_proj.weight"] = (hidden, hidden)
        out[p + "self_attn.v_proj.weight"] = (kv_width, hidden)
    out["model.norm.weight"] = (hidden,)
    out["lm_head.weight"] = (vocab, hidden)
    return out


def config(preset: str, dtype: str) -> dict:
    layers, hidden, inner, heads, kv, vocab = PRESETS[preset]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
        "max_position_embeddings": 2048,
        "hidden_act": "silu",
        "initializer_range": INIT,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "dtype": dtype,
        "use_cache": True,
    }


class Weights:
    """Tiles of the base (model 0) or of a fine-tune; the same tile of every model comes from the same offsets."""

    def __init__(self, seed: int, dtype: torch.dtype):
        self.seed, self.dtype = seed, dtype
        self.base = self._normal(0).mul_(INIT).to(dtype)
        self.shared = self._task(1)
        self.model, self.delta = 0, self.shared

    def _generator(self, stream: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 1000003 + stream)

    def _normal(self, stream: int) -> torch.Tensor:
        return torch.randn(POOL + TILE, generator=self._generator(stream))

    def _task(self, stream: int) -> torch.Tensor:
        """normal x uniform^4: most elements tiny, kurtosis about 14."""
        z = self._normal(stream)
        u = torch.rand(POOL + TILE, generator=self._generator(stream + 500009))
        return z.mul_(u.square_().square_()).mul_(DELTA)

    def use(self, model: int) -> None:
        self.model = model
        if model:
            self.delta = self._task(1 + model).add_(self.shared, alpha=SHARED)

    def tiles(self, index: int, count: int, norm: bool):
        rng = np.random.Generator(np.random.PCG64([self.seed, index]))
        strength = float(rng.uniform(0.6, 1.4))  # tensors differ in how far they move
        for start in range(0, count, TILE):
            n = min(TILE, count - start)
            at, by = (int(v) for v in rng.integers(0, POOL, 2))
            tile = self.base[at : at + n]
            if norm:
                tile = (1.0 + tile.float()).to(self.dtype)
            if self.model:
                tile = tile.float().add_(self.delta[by : by + n], alpha=strength).to(self.dtype)
            yield tile


def plan(tensors: dict[str, tuple[int, ...]], width: int, limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    used = 0
    for name, shape in tensors.items():
        size = int(np.prod(shape)) * width
        if used and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def write_model(folder: Path, weights: Weights, preset: str, dtype: str, limit: int) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = shapes(preset)
    order = {name: i for i, name in enumerate(tensors)}
    kind, code = DTYPES[dtype]
    width = kind.itemsize
    shards = plan(tensors, width, limit)
    names = (
        ["model.safetensors"]
        if len(shards) == 1
        else [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    )
    for file, keys in zip(names, shards, strict=True):
        header: dict = {"__metadata__": {"format": "pt"}}
        at = 0
        for key in keys:
            size = int(np.prod(tensors[key])) * width
            header[key] = {"dtype": code, "shape": list(tensors[key]), "data_offsets": [at, at + size]}
            at += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / file, "wb", buffering=0) as f:
            f.write(len(text).to_bytes(8, "little") + text)
            for key in keys:
                for tile in weights.tiles(order[key], int(np.prod(tensors[key])), "norm" in key):
                    view = memoryview(tile.view(torch.uint8).numpy())
                    while view:  # an unbuffered write may be short
                        view = view[f.write(view) :]
    total = sum(int(np.prod(s)) for s in tensors.values())
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": total * width},
            "weight_map": {k: f for f, keys in zip(names, shards, strict=True) for k in keys},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(config(preset, dtype), indent=2) + "\n")
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--params", choices=PRESETS, default="0.55b")
    parser.add_argument("--models", type=int, default=3, help="number of fine-tunes")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--shard-size", type=parse_size, default=parse_size("2GB"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", choices=["none"], default="none")
    args = parser.parse_args()
    if args.models < 0:
        parser.error("--models must not be negative")
    targets = [args.out / "base", *(args.out / f"ft{i}" for i in range(1, args.models + 1))]
    for folder in targets:
        if folder.is_dir() and any(folder.iterdir()):
            parser.error(f"{folder} is not empty")

    torch.set_num_threads(1)
    weights = Weights(args.seed, DTYPES[args.dtype][0])
    for i, folder in enumerate(targets):
        start = time.perf_counter()
        weights.use(i)
        total = write_model(folder, weights, args.params, args.dtype, args.shard_size)
        size = total * DTYPES[args.dtype][0].itemsize
        print(f"{folder}: {total / 1e9:.4f} B parameters, {size / 1e9:.2f} GB, {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
