"""Record what mergekit makes of the recipes in tests/golden/mergekit_cases.py. Run by mergekit's own Python:

    PEER/bin/python benchmarks/make_golden_mergekit.py [CASE ...]

Cases that fail there are named on stderr and left out. Only the results are stored (float32): the models come
from seeds. Results of a case are kept unless it is named.
"""

from __future__ import annotations

import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.numpy import load_file, save_file

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
sys.path.insert(0, str(GOLDEN))
import mergekit_cases  # noqa: E402


def main() -> None:
    """Run every case (or those named) and write tests/golden/mergekit.safetensors."""
    target = GOLDEN / "mergekit.safetensors"
    wanted = sys.argv[1:] or list(mergekit_cases.CASES)
    old = load_file(target) if target.exists() else {}
    found = {
        name: value
        for name, value in old.items()
        if (case := name.split("/")[0]) in mergekit_cases.CASES and case not in wanted
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        mergekit_cases.write_models(folder)
        for case in wanted:
            text = mergekit_cases.CASES[case]
            for model in mergekit_cases.MODELS + mergekit_cases.HYBRIDS:
                text = text.replace(f"model: {model}", f"model: {folder / model}")
            config = MergeConfiguration.model_validate(yaml.safe_load(text))
            try:
                run_merge(config, str(folder / case), MergeOptions(copy_tokenizer=False, quiet=True))
            except Exception as error:
                print(f"{case}: {type(error).__name__}: {error}", file=sys.stderr)
                continue
            for file in (folder / case).glob("*.safetensors"):
                found |= {f"{case}/{name}": value for name, value in load_file(file).items()}
    save_file(found, target, metadata={"made": f"mergekit {version('mergekit')}, torch {version('torch')}, float32"})


if __name__ == "__main__":
    main()
