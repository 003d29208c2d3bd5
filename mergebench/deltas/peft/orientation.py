"""Which way round a base stores the weights of linear layers: [out, in], or [in, out] as GPT-2's Conv1D.

PEFT asks the class of each layer. Its config holds one `fan_in_fan_out` for all, corrected to that of a layer that it
met, so it is wrong where an adapter has layers of both classes, and of square weights no shape tells. The base does: a
Conv1D always has a bias, as long as its outputs.
"""

from __future__ import annotations

from functools import cached_property

from mergebench.checkpoint.format import Base


class Orientation:
    """The orientation of a base's weights; said: what the adapter's config says, where the base does not tell."""

    def __init__(self, base: Base, said: bool) -> None:
        self._base, self._said = base.tensors, said
        self._of_transformers = "model_type" in base.config  # whose Conv1D has a bias

    def in_out(self, weight: str) -> bool:
        """Whether a weight of the base is stored [in, out]."""
        info, outputs = self._base[weight], self._outputs(weight)
        if len(info.shape) != 2:
            return False
        if outputs is None:
            return self._said and not self._any and not self._of_transformers
        if info.shape[0] != info.shape[1]:
            return outputs == info.shape[1]
        votes = self._votes.get(_last(weight)) or self._any
        return self._said if len(votes) != 1 else next(iter(votes))

    def _outputs(self, weight: str) -> int | None:
        """The length of the bias beside a weight."""
        bias = self._base.get(f"{weight.removesuffix('weight')}bias") if weight.endswith(".weight") else None
        return bias.shape[0] if bias is not None and len(bias.shape) == 1 else None

    @cached_property
    def _votes(self) -> dict[str, set[bool]]:
        """What the weights that are not square tell, by the last part of their modules' names."""
        votes: dict[str, set[bool]] = {}
        for name, info in self._base.items():
            if len(info.shape) == 2 and info.shape[0] != info.shape[1]:
                outputs = self._outputs(name)
                if outputs in info.shape:
                    votes.setdefault(_last(name), set()).add(outputs == info.shape[1])
        return votes

    @cached_property
    def _any(self) -> set[bool]:
        return set().union(*self._votes.values())


def _last(weight: str) -> str:
    return weight.removesuffix(".weight").rpartition(".")[2]
