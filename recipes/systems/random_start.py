"""Write a model with the base's configuration and tokenizer, and weights as they start before any training.

    python recipes/systems/random_start.py recipes/quickstart/cache/base OUT [--seed 0]

It is the control of claims about what pre-training does, such as that it lowers the intrinsic dimension.
"""

import argparse
import sys
from pathlib import Path

import torch
import transformers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if not (arguments.base / "config.json").is_file():
        sys.exit(f"{arguments.base}: no config.json; name a model's directory")
    if arguments.out.exists():
        sys.exit(f"{arguments.out}: it exists; choose another place")
    config = transformers.AutoConfig.from_pretrained(arguments.base)
    torch.manual_seed(arguments.seed)
    kind = getattr(transformers, (config.architectures or [""])[0], None)
    model = transformers.AutoModel.from_config(config) if kind is None else kind(config)
    model.float().save_pretrained(arguments.out)
    transformers.AutoTokenizer.from_pretrained(arguments.base).save_pretrained(arguments.out)
    print(arguments.out)


if __name__ == "__main__":
    main()
