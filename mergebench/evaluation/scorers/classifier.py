"""Classifier: the probability that a transformers sequence classifier gives a label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from mergebench.checkpoint.layouts import quiet
from mergebench.errors import ModelError, RecipeError, did_you_mean, first_line
from mergebench.evaluation.scorer import Continuation, Scorer, scorer
from mergebench.evaluation.task import Direction
from mergebench.networks.batch import CPU_TOKENS, batches
from mergebench.networks.tokenizer import load as load_tokenizer
from mergebench.parameters import param

LIMIT = 512  # tokens of a continuation that are read, where the tokenizer names no limit


@dataclass(frozen=True, kw_only=True)
class Params:
    classifier: Path = param(help="a directory with a transformers sequence classifier in safetensors", folder=True)
    label: str = param(help="the label whose probability is the score, as in its config.json")
    direction: Direction = param(help="which scores are better")


@scorer
def classifier(p: Params) -> Scorer:
    """Probability of a label that a sequence classifier gives the continuation, without its prompt."""
    from transformers import AutoConfig

    try:
        with quiet():
            config = AutoConfig.from_pretrained(p.classifier, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever its parts raise
        raise ModelError(f"{p.classifier}: not a classifier: {first_line(error)}") from None
    labels = {str(label): number for number, label in config.id2label.items()}
    if p.label not in labels:
        raise RecipeError(f"{p.classifier}: it has no label '{p.label}'", did_you_mean(p.label, labels))
    several = config.problem_type == "multi_label_classification"

    @cache
    def parts() -> tuple[Any, Any]:
        from transformers import AutoModelForSequenceClassification

        try:
            with quiet():
                model = AutoModelForSequenceClassification.from_pretrained(
                    p.classifier,
                    use_safetensors=True,  # a pickle runs code when it is read: never one that a suite names
                    dtype=torch.float32,
                    local_files_only=True,
                    trust_remote_code=False,
                )
        except Exception as error:  # transformers raises whatever its parts raise
            raise ModelError(f"{p.classifier}: not a classifier: {first_line(error)}") from None
        return model.eval(), load_tokenizer(p.classifier, str(p.classifier))[0]

    def score(items: Sequence[Continuation]) -> list[float]:
        model, tokenizer = parts()
        limit = min(LIMIT, tokenizer.model_max_length)
        tokens = [tokenizer(item.text, truncation=True, max_length=limit)["input_ids"] for item in items]
        scores = [0.0] * len(items)
        for part in batches([len(one) for one in tokens], CPU_TOKENS):
            padded = tokenizer.pad({"input_ids": [tokens[i] for i in part]}, return_tensors="pt")
            with torch.inference_mode(), quiet():
                logits = model(**padded).logits
            chances = logits.sigmoid() if several else logits.softmax(-1)
            for i, chance in zip(part, chances[:, labels[p.label]].tolist(), strict=True):
                scores[i] = chance
        return scores

    return Scorer(
        score,
        f"P({p.label})",
        p.direction,
        files=tuple(sorted(file for file in p.classifier.iterdir() if file.is_file())),
    )
