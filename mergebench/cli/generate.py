"""`mergebench generate`."""

from __future__ import annotations

from typing import Annotated

import typer

from mergebench.cli import options as opt
from mergebench.cli.output import note, say, say_json, say_part


def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A directory, BASE+DELTA or org/name.")],
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="What the model continues, or answers.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to write.")] = 64,
    device: opt.Device = "auto",
    json_: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Show what a language model writes after a prompt: always the likeliest token, as it comes.

    Example: mergebench generate edited --prompt Hello

    A prompt is put as a user's message where the model has a chat template.
    """
    quiet = quiet or json_
    note(f"reading {model}", quiet)
    from mergebench.networks.generation import generate as write_after

    text = write_after(
        model,
        prompt,
        max_tokens=max_tokens,
        device=opt.check_device(device),
        write=(lambda part: None) if json_ else say_part,
        remark=lambda said: note(f"note: {said}", quiet),
    )
    say_json({"model": model, "prompt": prompt, "text": text}) if json_ else say()
