"""What `bank.json` says of a bank: what its adapters belong to, how they were made, and which classes each task has.

{"mergebench": version,
 "backbone": {"model": reference, "sha256": of its contents},
 "features": {"kind": "image", "pooling": "cls", "max_length": null},
 "adapter": {"kind": "bottleneck", "scale": 0.1, "bottleneck": 16},
 "statistics": "covariance", "semantics": "paper", "alpha": 0.1, "seed": 0, "epochs": 20, "batch": 48,
 "items": {"test": "cache/test.jsonl", "id": "id", "content": "image", "label": "label"},
 "tasks": [{"name": "01", "classes": ["3", "7"], "files": {"adapters/01.safetensors": sha256, ...}}]}
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mergebench.checkpoint.files import write_atomically
from mergebench.errors import ModelError, RunError

MANIFEST = "bank.json"
ADAPTER, HEAD, TRAINED, CLASSES = FILES = (
    "adapters/{}.safetensors",
    "heads/{}.safetensors",
    "heads/{}.trained.safetensors",
    "classes/{}.safetensors",
)

Word = Annotated[str, Field(min_length=1)]


class Part(BaseModel):
    """JSON of exactly these keys and types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Backbone(Part):
    model: Word  # as the user wrote it
    sha256: Word  # of its files' contents


class Features(Part):
    kind: Literal["image", "text"]
    pooling: Literal["mean", "cls", "cls+mean"]
    max_length: Annotated[int, Field(ge=1)] | None  # tokens a text is cut to


class AdapterKind(Part):
    kind: Literal["bottleneck"]
    scale: Annotated[float, Field(allow_inf_nan=False)]
    bottleneck: Annotated[int, Field(ge=1)]


class Items(Part):
    """The columns of a file of items, and the file that the bank is to be tested on."""

    test: str | None = None
    id: Word = "id"
    content: Word | None = None  # text or image where not given
    label: Word = "label"


class TaskEntry(Part):
    name: Word  # 01, 02, ...
    classes: tuple[Word, ...]
    files: dict[str, str]  # the SHA-256 of each


class About(Part):
    """The whole of bank.json."""

    mergebench: str
    backbone: Backbone
    features: Features
    adapter: AdapterKind
    statistics: Literal["covariance", "variance", "centroids"]
    semantics: Literal["paper", "reference"]
    alpha: Annotated[float, Field(ge=0, le=1)]
    seed: Annotated[int, Field(ge=0)]
    epochs: Annotated[int, Field(ge=0)] = 20  # of a task's training; 0: the adapters add nothing
    batch: Annotated[int, Field(ge=1)] = 48  # items of a training step
    items: Items = Items()
    tasks: tuple[TaskEntry, ...] = ()

    @property
    def classes(self) -> tuple[str, ...]:
        """Of all tasks, in their order."""
        return tuple(name for task in self.tasks for name in task.classes)

    def check(self, file: Path) -> None:
        """`ModelError` where tasks are missing, a class is claimed twice, or the texts' length is not known."""
        if (self.features.max_length is None) != (self.features.kind == "image"):
            raise ModelError(f"{file}: features.max_length: texts have one, images have none", COMPLETE)
        home: dict[str, str] = {}
        for number, task in enumerate(self.tasks):
            if task.name != name_of(number):
                raise ModelError(f"{file}: task {name_of(number)} is missing: '{task.name:.20}' follows", COMPLETE)
            if task.files.keys() != {pattern.format(task.name) for pattern in FILES}:
                raise ModelError(f"{file}: task {task.name}: its files are not those of a task", COMPLETE)
            if not task.classes:
                raise ModelError(f"{file}: task {task.name} has no classes", "a task has at least one")
            for one in task.classes:
                if one in home:
                    what = f"class '{one:.60}' is claimed by task {home[one]} and again by task {task.name}"
                    raise ModelError(f"{file}: {what}", "a class belongs to one task")
                home[one] = task.name

    def write(self, directory: Path) -> None:
        """Put it in place at once."""
        write_atomically(directory / MANIFEST, self.model_dump_json(indent=1) + "\n")


COMPLETE = "a bank is read whole, as mergebench cil run wrote it"


def name_of(task: int) -> str:
    """What a task is called in a bank: 01 is task 0."""
    return f"{task + 1:02}"


def read_manifest(directory: Path) -> About:
    """Read and check bank.json; `ModelError` where there is none or it does not fit, `RunError` where it is broken."""
    file = directory / MANIFEST
    try:
        about = About.model_validate_json(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        missing = "no such directory" if not directory.exists() else f"not a bank: it has no {MANIFEST}"
        inside = sorted(directory.glob(f"*/*/{MANIFEST}"))  # as cil run leaves them, a seed and a kind each
        hint = f"it holds banks, such as {inside[0].parent}" if inside else "mergebench cil run writes banks"
        raise ModelError(f"{directory}: {missing}", hint) from None
    except OSError as error:
        raise RunError(f"{file}: cannot be read: {error.strerror}") from None
    except ValidationError as error:
        found = error.errors()[0]
        if found["type"] == "json_invalid":
            raise RunError(f"{file}: not readable as JSON: {found['ctx']['error']}", COMPLETE) from None
        where = ".".join(map(str, found["loc"])) or "the document"
        raise ModelError(f"{file}: {where}: {found['msg']}", COMPLETE) from None
    about.check(file)
    return about
