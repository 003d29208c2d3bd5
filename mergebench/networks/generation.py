"""What a causal language model writes: its own settings, and the likeliest text after a prompt."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mergebench.checkpoint.layouts import quiet
from mergebench.deltas.open import open_model
from mergebench.errors import RunError
from mergebench.networks.device import device_of
from mergebench.networks.network import Network
from mergebench.networks.tokenizer import no_token


def check_finite(network: Network) -> None:
    """Run one token through the model, to find a NaN in its weights, which the likeliest token would hide."""
    with torch.inference_mode():
        token = network.tokenizer.bos_token_id or network.tokenizer.eos_token_id or 0
        if not network.module(torch.tensor([[token]], device=network.device)).logits.isfinite().all():
            raise RunError(f"model '{network.name}': its outputs are not finite", "look for NaN or Inf in its weights")


def take_settings(network: Network) -> None:
    """The model's own, such as the tokens that end an answer; a model built from tensors has only the config's."""
    from transformers import GenerationConfig

    if (network.directory / "generation_config.json").is_file():
        own = GenerationConfig.from_pretrained(network.directory, local_files_only=True)
    else:
        own = GenerationConfig.from_model_config(network.module.config)
    network.module.generation_config = own


def generate(
    model: str,
    prompt: str,
    *,
    max_tokens: int = 64,
    device: str = "auto",
    write: Callable[[str], None] = lambda text: None,
    remark: Callable[[str], None] = lambda text: None,
) -> str:
    """What a language model writes after a prompt, of at most so many tokens: always the likeliest one. The prompt is
    put as a user's message where the tokenizer has a chat template.

    device: auto, cpu, cuda or cuda:N. write: called with each piece of text as it is known; remark: with notes on the
    model. Raises `RunError` if the prompt has no token, or the model's outputs are not finite.
    """
    network = Network(open_model(model, to_run=True), "AutoModelForCausalLM", device_of(device))
    text = _written(network, prompt, max_tokens, write)
    for note in network.remarks:
        remark(note)
    return text


def _written(network: Network, prompt: str, most: int, write: Callable[[str], None]) -> str:
    from transformers import TextStreamer

    tokenizer, parts = network.tokenizer, list[str]()
    chat = bool(getattr(tokenizer, "chat_template", None))
    message = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True) if chat else prompt
    ids = tokenizer(text, add_special_tokens=not chat)["input_ids"]
    if not ids:
        raise no_token(network.name, prompt)

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            parts.append(text)
            write(text)

    check_finite(network)
    take_settings(network)
    tokens, streamer = torch.tensor([ids], device=network.device), Streamer(tokenizer, True, skip_special_tokens=True)
    with quiet(), torch.inference_mode():
        network.module.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=most, do_sample=False, streamer=streamer
        )
    return "".join(parts)
