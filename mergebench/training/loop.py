"""The training loop: `transformers.Trainer` on a network with something attached.

The trainer sees one small module, `Student`, whose parameters are the trained ones alone: checkpoints hold nothing
else, and several processes exchange nothing else. The network itself is not a part of it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import Dataset
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import get_last_checkpoint

from mergebench.errors import RunError
from mergebench.training.memory import saved_by_autograd
from mergebench.training.objective import Asked, Loss
from mergebench.training.processes import count
from mergebench.training.settings import Settings
from mergebench.training.student import Fit, Student
from mergebench.training.task import Rows

Progress = Callable[[str, int, int], None]  # what, steps done, of how many


class _Items(Dataset[int]):
    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> int:
        return index


class _ByLength(LengthGroupedSampler):
    """Items of like length together, in an order that seed and epoch decide."""

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed(self._seed + epoch)

    _seed = 0


class _Trainer(transformers.Trainer):
    """The library's loop, with this project's losses and measurements."""

    def __init__(
        self, student: Student, loss: Loss, settings: Settings, fit: Fit, seed: int, progress: Progress, **more: Any
    ):
        self._student, self._loss, self._settings, self._fit = student, loss, settings, fit
        self._seed, self._progress = seed, progress
        super().__init__(model=student, **more)
        self.model_accepts_loss_kwargs = False
        for one in (transformers.trainer_callback.PrinterCallback, transformers.trainer_callback.ProgressCallback):
            self.remove_callback(one)
        self.add_callback(_Steps(self))

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        lengths = list(self._student.task.lengths(self._student.network, "train"))
        generator = torch.Generator()
        sampler = _ByLength(self._settings.batch * self._settings.accumulate, lengths=lengths, generator=generator)
        sampler._seed = 1_000_003 * self._seed
        sampler.set_epoch(0)
        return sampler

    def create_optimizer(self, model: Any = None) -> Any:
        """AdamW; the head has a learning rate of its own."""
        if self.optimizer is None:
            named = self._student.trained
            head = [one for name, one in named.items() if name.startswith("head/")]
            others = [one for name, one in named.items() if not name.startswith("head/")]
            groups = [{"params": others, "lr": self.args.learning_rate}, {"params": head, "lr": self._settings.head_lr}]
            groups = [group for group in groups if group["params"]]
            self.optimizer = torch.optim.AdamW(
                groups, lr=self.args.learning_rate, weight_decay=self._settings.weight_decay
            )
        return self.optimizer

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The objective's loss, and what the attached adds; `RunError` if it is not finite."""
        items = inputs["items"]
        self._loss.before(self._student)
        counted = saved_by_autograd(self._student) if not self._fit.saved else nullcontext()
        with counted as count:
            rows = model(items)
            if isinstance(rows, tuple) and not isinstance(rows, Rows):
                rows = Rows(*rows)
            loss = self._loss(Asked(rows, items.tolist(), self._student))
        if count is not None:
            self._fit.saved = count.bytes
        extra = self._student.attached.penalty()
        if extra is not None:  # for its gradient alone, so that curves of all kinds show the task's loss
            loss = loss + (extra - extra.detach())
        if not torch.isfinite(loss):
            ids = self._student.task.parts["train"]
            some = ", ".join(ids[i] for i in items.tolist()[:8])
            step = self.state.global_step + 1
            raise RunError(
                f"step {step}: the loss is not finite; the batch's items: {some}{', ...' * (len(items) > 8)}",
                f"give a smaller lr than {self.args.learning_rate:g}, or look at these items",
            )
        return loss

    def evaluate(self, *args: Any, **more: Any) -> dict[str, float]:
        """Loss and score on the validation items."""
        measured = self._student.measure("validation")
        metrics = {"eval_loss": measured.loss, "eval_score": measured.score.value}
        self.log(dict(metrics))  # into the checkpoint too
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _determine_best_metric(self, metrics: Any, trial: Any) -> bool:
        settled = self._student.attached.settled(self.state.global_step)
        return settled and bool(super()._determine_best_metric(metrics, trial))


class _Steps(transformers.TrainerCallback):
    def __init__(self, trainer: _Trainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """What an earlier process measured, before it was stopped."""
        fit = self._trainer._fit
        for one in state.log_history:
            if "seconds" in one:
                fit.seconds, fit.saved = one["seconds"], int(one["saved"])
        self._started = time.perf_counter() - fit.seconds

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """While the gradients are still there."""
        self._trainer._student.attached.after_step(state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self._trainer._progress("training", state.global_step, state.max_steps)
        if control.should_save:
            seconds = time.perf_counter() - self._started
            state.log_history.append({"step": state.global_step, "seconds": seconds, "saved": self._trainer._fit.saved})

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
        self._trainer._fit.history += _history([{**(logs or {}), "step": state.global_step}])


@dataclass(frozen=True)
class Schedule:
    """How many steps a training has."""

    items: int
    settings: Settings
    processes: int = 1

    @cached_property
    def of_epoch(self) -> int:
        """Steps in which every item is read once."""
        batches = math.ceil(self.items / (self.settings.batch * self.processes))
        return max(math.ceil(batches / self.settings.accumulate), 1)

    @property
    def steps(self) -> int:
        """In all."""
        return self.settings.max_steps or math.ceil(self.settings.epochs * self.of_epoch)

    @property
    def every(self) -> int:
        """Steps between two measurements."""
        return min(self.settings.every or self.of_epoch, self.steps)


def fit(
    student: Student,
    loss: Loss,
    settings: Settings,
    *,
    lr: float,
    seed: int,
    directory: Path,
    progress: Progress = lambda what, done, total: None,
    saved: Callable[[], None] = lambda: None,
) -> Fit:
    """Train a student once; its checkpoints are in `directory`, the last of which is continued.

    With validation items it ends with the parameters of the best measurement. saved: called after each checkpoint.
    Raises `RunError` with the step and the batch's items if the loss is not finite.
    """
    task = student.task
    chooses = "validation" in task.parts
    schedule = Schedule(len(task.parts["train"]), settings, count())
    found = Fit(student)
    how = "steps" if chooses else "no"
    arguments = transformers.TrainingArguments(
        output_dir=str(directory),
        max_steps=schedule.steps,
        per_device_train_batch_size=settings.batch,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=lr,
        lr_scheduler_type=settings.schedule if settings.schedule != "constant" else "constant_with_warmup",
        warmup_steps=math.ceil(settings.warmup * schedule.steps),
        max_grad_norm=settings.clip,
        eval_strategy=how,
        eval_steps=schedule.every,
        save_strategy="steps",
        save_steps=schedule.every,
        save_total_limit=2,
        load_best_model_at_end=chooses,
        metric_for_best_model=f"eval_{task.choose_by}",
        greater_is_better=task.choose_by == "score",
        logging_steps=max(schedule.every // 10, 1),
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=student.network.device.type == "cuda",
        use_cpu=student.network.device.type == "cpu",
        bf16=settings.bf16,
        seed=seed,
        log_level="error",
    )
    trainer = _Trainer(
        student,
        loss,
        settings,
        found,
        seed,
        progress,
        args=arguments,
        train_dataset=_Items(len(task.parts["train"])),
        eval_dataset=_Items(1) if chooses else None,
        data_collator=lambda items: {"items": torch.tensor(items)},
        callbacks=[_Saved(saved)],
    )
    started = time.perf_counter()
    student.attached.begin(task, student.head, directory, progress)
    last = get_last_checkpoint(str(directory)) if directory.is_dir() else None  # type: ignore[no-untyped-call]
    trainer.train(resume_from_checkpoint=last)
    found.seconds += time.perf_counter() - started
    found.steps = trainer.state.global_step
    found.best = trainer.state.best_metric
    if last is not None:
        found.history = [*_before(trainer.state.log_history, found.history), *found.history]
    return found


class _Saved(transformers.TrainerCallback):
    def __init__(self, saved: Callable[[], None]) -> None:
        self._saved = saved

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """After each checkpoint."""
        self._saved()


_CURVES = {"loss": "loss", "eval_loss": "validation_loss", "eval_score": "validation"}  # by the library's names


def _history(log: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """The points of the curves that were logged."""
    points = ({ours: float(one[key]) for key, ours in _CURVES.items() if key in one} for one in log)
    return [{"step": one["step"], **point} for one, point in zip(log, points, strict=True) if point]


def _before(log: Sequence[Mapping[str, float]], history: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """What was logged before a training was resumed."""
    first = min((one["step"] for one in history), default=math.inf)
    return [one for one in _history(log) if one["step"] < first]
