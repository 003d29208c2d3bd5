"""What PEFT calls the modules of a model: by its class in transformers, which may add a prefix to the files' names."""

from __future__ import annotations

import re
from collections.abc import Collection

import torch

from mergebench.checkpoint.model import Model

_ALREADY = re.compile(r"^model\.")  # as most classes with a head call the model below it
_WITHOUT_HEAD = re.compile(r"(?<!Head)(?<!Heads)Model$")


def prefix(model: Model, modules: Collection[str]) -> str:
    """What comes before the files' names in the class that config.json names, such as `transformer.`.

    GPT-2's files say `h.0.attn.c_attn`, a GPT2LMHeadModel `transformer.h.0.attn.c_attn`; transformers loads either,
    PEFT only the class's own. Without a class to ask, the files' names stand.
    """
    name = str((model.config.get("architectures") or [""])[0])
    if not name or _WITHOUT_HEAD.search(name) or any(_ALREADY.match(module) for module in modules):
        return ""
    import transformers
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(50)  # nothing below critical
    try:
        kind = getattr(transformers, name)
        with torch.device("meta"):
            built = kind(kind.config_class.from_dict(model.config))
    except Exception:  # a class that is not there, or has something against the config
        return ""
    finally:
        logging.set_verbosity(level)
    known = {module for module, _ in built.named_modules()}
    ways = ("", f"{built.base_model_prefix}.")
    return next((way for way in ways if all(way + module in known for module in modules)), "")
