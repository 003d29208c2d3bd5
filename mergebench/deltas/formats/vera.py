"""VeRA as PEFT saves it: two vectors a module, and the shared random matrices, or the seed they are drawn from."""

from __future__ import annotations

from collections.abc import Iterator

from mergebench.deltas.peft.module import Change, Module, peft_type
from mergebench.deltas.shared_factors import shared_factors


@peft_type(
    "VERA",
    A="vera_A",
    B="vera_B",
    outputs="vera_lambda_b",
    ranks="vera_lambda_d",
    shared=("A", "B"),
)
def vera(module: Module) -> Iterator[Change]:
    """The vectors of a module on its share of the matrices."""
    yield shared(module)


def shared(module: Module, halves: int = 1) -> Change:
    """The change of a module of VeRA, or of PVeRA, where the vectors of ranks have two `halves`: mean and variance."""
    outputs, ranks = module.part("outputs", None), module.part("ranks", None)
    if ranks.shape[0] % halves:
        raise module.error(f"ranks {list(ranks.shape)} are no mean and variance")
    parts = {"outputs": outputs, "ranks": ranks._replace(shape=(ranks.shape[0] // halves,))}
    settings = {"inputs": module.out_in[1], "columns": module.in_out}
    if "A" in module.parts or "B" in module.parts:
        parts |= {"a": module.part("A", ranks.shape[0], None), "b": module.part("B", None, None)}
    else:
        seed = module.config.get("projection_prng_key")
        if module.config.get("save_projection", True) or not isinstance(seed, int):
            raise module.error("the shared matrices are not there, nor a projection_prng_key to draw them from")
        out, inner = zip(*(one.out_in for one in module.all), strict=True)
        drawn = {"drawn_ranks": ranks.shape[0], "drawn_inputs": max(inner), "drawn_outputs": max(out)}
        settings |= {"seed": seed, **drawn}
    return Change(shared_factors, parts, settings)
