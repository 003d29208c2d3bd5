"""Inputs and stored outputs of the PCB-Merging goldens (pcb.safetensors).

Only outputs are stored; the task vectors are made again here. They use nothing but PCG64's raw 64-bit words, + - * /
and sqrt in float64 and one rounding to float32, so they are bitwise the same everywhere (no libm, no numpy
distribution code). ``sha256`` of the little-endian float32 bytes is in the file's metadata all the same.
"""

import hashlib
import json
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("pcb.safetensors")

# name: (D, N, density, seed, scale, grid). grid > 0 rounds the task vectors to multiples of it, as differences of
# low-precision weights are: many ties in |tau|. scale 1.0 reaches the part of tanh that is not linear.
CASES = {
    "d1009_n2": (1009, 2, 0.2, 11, 1e-3, 0.0),
    "d10007_n3": (10007, 3, 0.1, 12, 1e-3, 0.0),
    "d10007_n8": (10007, 8, 0.05, 13, 1e-3, 0.0),
    "d20000_n3": (20000, 3, 0.2, 14, 1e-3, 0.0),
    "d65539_n2": (65539, 2, 0.1, 15, 1e-3, 0.0),
    "d4001_n3_scale1": (4001, 3, 0.2, 16, 1.0, 0.0),
    "d10007_n2_grid": (10007, 2, 0.1, 17, 1e-3, 2.0**-13),
}
VARIANTS = ("readme", "nlp", "vision-es", "vision")


def task_vectors(case: str) -> np.ndarray:
    """The [N, D] float32 task vectors of a case: heavy tails, about a fifth exact zeros, a shared part, conflicts."""
    d, n, _, seed, scale, grid = CASES[case]
    bits = np.random.PCG64(seed)

    def uniform() -> np.ndarray:
        return (bits.random_raw(d) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def heavy() -> np.ndarray:  # a near-normal numerator over a random spread
        z = uniform() + uniform() + uniform() + uniform() - 2.0
        return z / np.sqrt(uniform() + 0.02)

    shared = heavy()
    rows = []
    for i in range(n):
        row = (heavy() + 0.5 * shared) * (scale * (1.0 + 0.25 * i))
        row[uniform() < 0.2] = 0.0
        if grid:
            row = np.rint(row / grid) * grid
        rows.append(row.astype(np.float32))
    return np.stack(rows)


def sha256(x: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(x, dtype="<f4").tobytes()).hexdigest()


def pack(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A vector as (packed bits of x != 0, its non-zero values)."""
    mask = x != 0
    return np.packbits(mask), x[mask]


def unpack(bits: np.ndarray, values: np.ndarray, d: int) -> np.ndarray:
    out = np.zeros(d, dtype=values.dtype)
    out[np.unpackbits(bits, count=d).astype(bool)] = values
    return out


def load() -> tuple[dict[str, np.ndarray], dict]:
    """({"CASE/VARIANT": merged [D], "CASE/VARIANT/kept": int64 [N], …}, metadata by case)."""
    from safetensors import safe_open

    out: dict[str, np.ndarray] = {}
    with safe_open(FILE, "np") as f:
        meta = json.loads(f.metadata()["cases"])
        for key in f.keys():  # noqa: SIM118 (not a dict)
            if key.endswith("/bits"):
                name = key.removesuffix("/bits")
                d = CASES[name.split("/")[0]][0]
                out[name] = unpack(f.get_tensor(key), f.get_tensor(name + "/values"), d)
            elif not key.endswith("/values"):
                out[key] = f.get_tensor(key)
    return out, meta
