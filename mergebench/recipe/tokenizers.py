"""Tokenizers of the models, and the tokenizer of a merge of different vocabularies."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergebench.checkpoint import Model
from mergebench.checkpoint.documents import document, parse_json, read_bytes
from mergebench.checkpoint.side_files import check_link, tokenizer_files
from mergebench.errors import ModelError, RunError

_TEMPLATE, _CONFIG = "chat_template.jinja", "tokenizer_config.json"


def vocab_size(config: Mapping[str, Any]) -> int | None:
    """The number of tokens in a config."""
    own = config.get("vocab_size")
    nested = config.get("text_config")
    size = nested.get("vocab_size") if own is None and isinstance(nested, dict) else own
    return size if isinstance(size, int) else None


def with_vocab_size(config: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Changes of config.json for another number of tokens."""
    if vocab_size(config) in (None, size):
        return {}
    if "vocab_size" in config:
        return {"vocab_size": size}
    return {"text_config": {**config["text_config"], "vocab_size": size}}


def load(directory: Path | None, reference: str) -> tuple[Any, str | None]:
    """The tokenizer in a directory, and a remark if its class is not used."""
    from mergebench.networks.tokenizer import load  # this import loads torch

    return load(directory, reference)


def tokens_of(tokenizer: Any) -> dict[str, int]:
    """A tokenizer's tokens and their ids, in the order of the ids."""
    return dict(sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1]))


def without_unused(tokenizer: Any, size: int | None, reference: str) -> Any:
    """The tokenizer without tokens that have no row in a model of `size` tokens; unchanged if there are none."""
    unused = {token for token, number in tokenizer.get_vocab().items() if size is not None and number >= size}
    if not unused:
        return tokenizer
    with tempfile.TemporaryDirectory(prefix="mergebench-") as folder:
        _save(tokenizer, folder)
        path = Path(folder) / "tokenizer.json"
        whole = document(path) if path.is_file() else {}
        model = whole.get("model", {})
        added = {one["content"] for one in whole.get("added_tokens", ())}
        if model.get("type") != "BPE" and not unused <= added:
            raise ModelError(f"model '{reference}': its tokenizer has {len(unused)} tokens that it has no rows for")
        whole["added_tokens"] = [one for one in whole["added_tokens"] if one["id"] < size]
        model["vocab"] = {token: number for token, number in model["vocab"].items() if token not in unused}
        if "merges" in model:
            pairs = ((one, one.split(" ") if isinstance(one, str) else one) for one in model["merges"])
            model["merges"] = [one for one, pair in pairs if unused.isdisjoint((*pair, "".join(pair)))]
        path.write_text(json.dumps(whole, ensure_ascii=False), encoding="utf-8")
        return load(Path(folder), reference)[0]


def union(base: Any, tokenizers: Sequence[Any], sizes: Sequence[int | None]) -> Any:
    """The base's tokenizer and, after its tokens, those of the others: ordinary ones first, then added ones.

    If several tokenizers add a token with different settings, the first tokenizer's settings are used.
    """
    words: dict[str, None] = {}
    added: dict[str, Any] = {}
    for tokenizer, size in zip(tokenizers, sizes, strict=True):
        most = size if size is not None else len(tokenizer.get_vocab())
        own = {number: token for number, token in sorted(tokenizer.added_tokens_decoder.items()) if number < most}
        marked = {token.content for token in tokenizer.added_tokens_decoder.values()}
        for token, number in tokens_of(tokenizer).items():
            if number < most and token not in marked:
                words.setdefault(token)
        for token in own.values():
            added.setdefault(token.content, token)
    known = base.get_vocab()
    new = [token for token in words if token not in added and token not in known]
    marked = {token.content for token in base.added_tokens_decoder.values()}
    special = [token for token in added.values() if token.content not in marked]
    if not new and not special:
        return base
    with tempfile.TemporaryDirectory(prefix="mergebench-") as folder:
        _save(base, folder)
        result, _ = load(Path(folder), "base")
    result.add_tokens(new)
    result.add_tokens(special)
    return result


def _save(tokenizer: Any, folder: str) -> None:
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # tokenizers raises bare exceptions where the disk is full
        reason = str(error).strip().split("\n", 1)[0]
        raise RunError(f"{folder}: no tokenizer can be written: {reason}", "set TMPDIR to another disk") from None


def saved(tokenizer: Any, source: Path | None) -> dict[str, bytes]:
    """The files that transformers writes for a tokenizer; its class is the one that `source` names.

    source: the directory that the tokenizer comes from.
    """
    with tempfile.TemporaryDirectory(prefix="mergebench-") as folder:
        _save(tokenizer, folder)
        files = stored(Path(folder))
    declared = _config(stored(source)).get("tokenizer_class") if source is not None else None
    if declared is not None and _CONFIG in files:
        config = _config(files) | {"tokenizer_class": declared}
        files[_CONFIG] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    return files


def stored(directory: Path) -> dict[str, bytes]:
    """The tokenizer files in a directory, to be copied."""
    return taken(directory, tokenizer_files(directory))


def taken(directory: Path, files: Iterable[Path]) -> dict[str, bytes]:
    """Files of a model's directory, by name, to be copied; `ModelError` for a link out of it."""
    found = {}
    for file in files:
        check_link(file, directory, directory.glob("*.safetensors"))
        found[file.name] = read_bytes(file)
    return found


def with_template(files: Mapping[str, bytes], template: str) -> dict[str, bytes]:
    """Tokenizer files with another chat template."""
    found = {name: content for name, content in files.items() if name != "chat_template.json"}
    config = _config(files)
    if config.pop("chat_template", None) is not None:
        found[_CONFIG] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    return found | {_TEMPLATE: template.encode()}


def usual_template(models: Sequence[Model]) -> tuple[str, Model] | None:
    """The chat template that most models have, the first of equals, and the first to have it; None if none has any."""
    found: Counter[str] = Counter()
    first: dict[str, Model] = {}
    for model in models:
        files = stored(model.config_directory) if model.config_directory is not None else {}
        own = files.get(_TEMPLATE)
        template: Any = _config(files).get("chat_template") if own is None else own.decode(errors="replace")
        if isinstance(template, list):
            template = {str(one.get("name")): one.get("template") for one in template if isinstance(one, dict)}
        if isinstance(template, dict):
            template = template.get("default")
        if isinstance(template, str) and template.strip():
            found[template.strip()] += 1
            first.setdefault(template.strip(), model)
    usual = found.most_common(1)[0][0] if found else None
    return None if usual is None else (usual, first[usual])


def _config(files: Mapping[str, bytes]) -> dict[str, Any]:
    try:
        config: dict[str, Any] = parse_json(files.get(_CONFIG, b"{}"))
    except ValueError:
        return {}
    return config
