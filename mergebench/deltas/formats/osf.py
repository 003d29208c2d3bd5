"""OSF as PEFT saves it: the singular directions that were trained; those that stay are computed from the base."""

from __future__ import annotations

from collections.abc import Iterator

from mergebench.deltas.peft.module import Change, Module, peft_type
from mergebench.deltas.truncated import truncated


@peft_type(
    "OSF",
    U=r"osf_svd_params(?:\.default)?\.U_low",
    S=r"osf_svd_params(?:\.default)?\.S_low",
    V=r"osf_svd_params(?:\.default)?\.V_low",
    shape=lambda parts: (parts["U"].shape[0], parts["V"].shape[-1]),
)
def osf(module: Module) -> Iterator[Change]:
    """The singular directions of a module; the rank that stays is told by their number."""
    u = module.part("U", None, None)
    m = u.shape[1]
    yield Change(truncated, {"u": u, "s": module.part("S", m), "v": module.part("V", m, None)})
