"""The tokenizer beside a model. Its tokenizer.json decides, because its publisher made the tokens with it.

transformers builds the class that a config names and takes only parts of tokenizer.json, so that its tokens may be
others. Such a class is not used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mergebench.checkpoint.layouts import quiet
from mergebench.checkpoint.side_files import SENTENCEPIECE, needs_sentencepiece, tokenizer_files
from mergebench.errors import ModelError, RunError, first_line
from mergebench.networks.module import failed

FILE = "tokenizer.json"
_BESIDE = ("tokenizer_config", "special_tokens_map", "added_tokens", "chat_template")  # files without a vocabulary
_OTHER = f"check that {FILE} belongs to the model"
_TEXTS = (  # where pipelines differ: digits, spaces, capitals, accents, contractions, code, other scripts
    "In 2023, 650841823 of them didn't pay £12.50; I'LL ask  twice.\n\n\tdef f(x):\r\n    return x_1 != 'é'\n",
    " Hello world!hello  ÀÉÎ naïve e\u0301 straße 東京タワー मुझे שלום 👩‍🚀 ½ ﬁ <s> A-B_c/d",
)


def load(directory: Path | None, reference: str) -> tuple[Any, str | None]:
    """The tokenizer in a directory, and a remark if transformers' class for it gives other tokens than its file.

    Code in the directory is never run. `ModelError` if there is no tokenizer, or none that can be read.
    """
    files = [] if directory is None else [file.name for file in tokenizer_files(directory)]
    hint = f"put {FILE} beside its weights (copy the base's if it shares the base's tokens)"
    lacking = ModelError(f"model '{reference}': it has no tokenizer", hint)
    if directory is None or not files:
        raise lacking
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
            if not (directory / FILE).is_file():
                return tokenizer, None
            file = Tokenizer.from_file(str(directory / FILE))
            if _pipeline(getattr(tokenizer, "backend_tokenizer", None)) == _pipeline(file):
                return tokenizer, None
            own = PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers let any error of their parts through
        if all(name.startswith(_BESIDE) for name in files):  # some tokenizers, of bytes, need no other file
            raise lacking from None
        missing = needs_sentencepiece(directory)
        if missing is not None:
            raise ModelError(f"model '{reference}': its tokenizer: {missing}", SENTENCEPIECE) from None
        raise failed(reference, "its tokenizer", error) from None
    known = file.get_vocab()
    for role, token in tokenizer.special_tokens_map.items():  # a class may know some that no file names
        if getattr(own, role, None) is None and str(token) in known:
            setattr(own, role, token)
    name = type(tokenizer).__name__
    same = _tokens(tokenizer) == _tokens(own)
    return own, None if same else f"transformers' {name} gives other tokens than {FILE}; the file is used"


def tokenize(tokenizer: Any, model: str, texts: list[str], max_length: int) -> list[list[int]]:
    """Token ids of each text with special tokens, cut to `max_length` or to the tokenizer's maximum.

    model: its name. `RunError` if a text has none, `ModelError` if the tokenizer fails.
    """
    limit = min(max_length, tokenizer.model_max_length)
    try:
        with quiet():
            ids: list[list[int]] = tokenizer(texts, truncation=True, max_length=limit)["input_ids"]
    except Exception as error:  # tokenizers raises bare ones, such as for a letter that no token stands for
        raise ModelError(f"model '{model}': its tokenizer: {first_line(error)}", _OTHER) from None
    for text, one in zip(texts, ids, strict=True):
        if not one:
            raise no_token(model, text)
    return ids


def no_token(model: str, text: str) -> RunError:
    """The error for a text that a model's tokenizer makes nothing of."""
    what = f"model '{model}': its tokenizer gives no token for {text!r:.60}"
    return RunError(what, f"{_OTHER}, and take out texts of blanks alone")


def _tokens(tokenizer: Any) -> Any:
    """The tokens of the texts; None if it fails: a class may know no token for what is unknown."""
    try:
        with quiet():
            return tokenizer(list(_TEXTS), add_special_tokens=False)["input_ids"]
    except Exception:  # tokenizers raises bare ones
        return None


def _pipeline(tokenizer: Any) -> Any:
    """What decides a text's tokens, special ones apart: equal for tokenizers that give the same."""
    if tokenizer is None:
        return None
    parts = (tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.model)
    return [part and part.__getstate__() for part in parts], repr(tokenizer.get_added_tokens_decoder())
