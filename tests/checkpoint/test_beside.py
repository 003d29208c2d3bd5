"""What is said of files beside the weights that differ between the models of a merge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import mergebench
from tests.models import write_model

GENERATION, TEMPLATE = "generation_config.json", "chat_template.jinja"
TOKENIZER = "tokenizer_config.json"
PIPELINE = {"model_index.json": '{"scheduler": ["diffusers", "A"], "unet": ["diffusers", "B"]}'}
SCHEDULER = "scheduler/scheduler_config.json"
END = {"eos_token_id": 2, "transformers_version": "4"}
AUTO = "chat template (chat_template: auto takes the usual one)"
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str | None]] = {
    "nothing": (
        {GENERATION: END, TEMPLATE: "a"}, {GENERATION: END | {"transformers_version": "5"}, TEMPLATE: "a\n"}, None),
    "where turns end": ({GENERATION: END}, {GENERATION: {"eos_token_id": [2, 5]}}, f"{GENERATION} (eos_token_id)"),
    "only the model's": ({}, {GENERATION: END, TEMPLATE: "a"}, f"{AUTO}, {GENERATION}"),
    "only the base's": ({GENERATION: END, TEMPLATE: "a"}, {}, None),
    "a template in the tokenizer": ({TOKENIZER: {"chat_template": "a"}}, {TOKENIZER: {"chat_template": "b"}}, AUTO),
    "keys": (
        {"preprocessor_config.json": {}}, {"preprocessor_config.json": {"a": 1, "b": 2, "c": 3}},
        "preprocessor_config.json (a, b, ...)",
    ),
    "a scheduler": (
        {**PIPELINE, SCHEDULER: {"prediction_type": "epsilon"}}, {SCHEDULER: {"prediction_type": "v_prediction"}},
        f"{SCHEDULER} (prediction_type)",
    ),
    "damaged": ({GENERATION: "no JSON"}, {GENERATION: END}, None),
}  # fmt: skip


def notes(folder: Path, files: tuple[dict[str, Any], dict[str, Any]], **more: Any) -> list[str]:
    for name, beside in zip(("base", "chat"), files, strict=True):
        write_model(folder / name, {"w": torch.ones(2)}, config=None)
        for file, content in beside.items():
            (folder / name / file).parent.mkdir(exist_ok=True)
            (folder / name / file).write_text(content if isinstance(content, str) else json.dumps(content))
    recipe = {"models": [{"model": str(folder / name)} for name in ("base", "chat")], "merge_method": "linear", **more}
    return list(mergebench.plan(mergebench.load(recipe), device="cpu").merge.notes)


@pytest.mark.parametrize("case", CASES)
def test_what_differs_is_said(tmp_path: Path, case: str) -> None:
    ours, theirs, says = CASES[case]
    base = tmp_path / "base"
    expected = [] if says is None else [f"chat: it differs from {base} in {says}; the result has what {base} has"]
    assert notes(tmp_path, (ours, theirs)) == expected


def test_a_template_that_the_recipe_chooses_is_no_difference(tmp_path: Path) -> None:
    files = {TEMPLATE: "a", GENERATION: {}}, {TEMPLATE: "b", GENERATION: END, "preprocessor_config.json": END}
    (note,) = notes(tmp_path, files, chat_template="auto")
    assert "preprocessor_config.json" in note and "chat template (" not in note and GENERATION not in note
