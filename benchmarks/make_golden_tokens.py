"""Record what mergekit makes of the recipes in tests/golden/mergekit_tokens.py. Run by mergekit's own Python:

    PEER/bin/python benchmarks/make_golden_tokens.py

Stored are embeddings and heads (float32) and each token's id: models and tokenizers come from seeds and lists.
"""

from __future__ import annotations

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
sys.path.insert(0, str(GOLDEN))
import mergekit_tokens  # noqa: E402


def main() -> None:
    """Run every case and write tests/golden/mergekit_tokens.safetensors and .json."""
    found, ids = {}, {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        mergekit_tokens.write_models(folder)
        for case, text in mergekit_tokens.CASES.items():
            for model in mergekit_tokens.MODELS:
                for key in ("model", "base_model", "source", "tokenizer_source"):
                    place = "base" if key.endswith("source") and model == "base" else folder / model
                    for end in (",", "}", "\n"):
                        text = text.replace(f"{key}: {model}{end}", f"{key}: {place}{end}")
            run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), str(folder / case), MergeOptions())
            merged = load_file(folder / case / "model.safetensors")
            found |= {f"{case}/{name}": merged[name] for name in mergekit_tokens.VOCABULARY}
            vocabulary = AutoTokenizer.from_pretrained(folder / case).get_vocab()
            ids[case] = dict(sorted(vocabulary.items(), key=lambda pair: pair[1]))
    made = {"made": f"mergekit {version('mergekit')}, torch {version('torch')}, float32"}
    save_file(found, GOLDEN / "mergekit_tokens.safetensors", metadata=made)
    (GOLDEN / "mergekit_tokens.safetensors").chmod(0o644)
    (GOLDEN / "mergekit_tokens.json").write_text(json.dumps(ids, indent=0) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
