"""The bridge to lm-evaluation-harness: run its tasks on the model in a `Network`.

lm-eval forms the prompts, reads the answers and computes the metrics, so the results are its own (Gao et al., 2021,
doi:10.5281/zenodo.5371628). This file prevents side effects: nothing is printed, the network is used only to fetch the
data set of one of lm-eval's own tasks, and the caller's random state is restored. Batches are cut by tokens.
"""

from __future__ import annotations

import io
import logging
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from copy import copy, deepcopy
from functools import cache
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

import torch

from mergebench.checkpoint.layouts import quiet
from mergebench.errors import MergebenchError, ModelError, RunError, first_line, out_of_memory
from mergebench.networks.batch import batches, run_batches
from mergebench.networks.generation import check_finite, take_settings
from mergebench.networks.tokenizer import no_token
from mergebench.plugins import need

if TYPE_CHECKING:
    from mergebench.networks.loadable import Tick
    from mergebench.networks.network import Network

READ_TOKENS = {"cpu": 256, "cuda": 8192}  # in a batch, padding included; each costs two float32 rows of the vocabulary
WRITTEN_TOKENS = {"cpu": 1024, "cuda": 32_768}  # prompt and continuation; only the last has such rows
SEED = 1234  # lm-eval's own default, of sampled continuations and drawn examples
RESAMPLES = 1000  # for the standard error of metrics other than means
LOGGERS = ("lm_eval", "datasets", "huggingface_hub", "absl")

Document = dict[str, Any]


def needed(kind: str) -> dict[str, str]:
    """The version of lm-evaluation-harness, without importing it; `RecipeError` if it is not installed."""
    return {"lm-eval": need("lm-eval", f"{kind} tasks")}


def local_task(output_type: str, documents: Sequence[Document], **config: Any) -> Any:
    """A task of lm-eval on documents in memory. `config` has lm-eval's keys; texts are best given as functions,
    because it takes a word for a column or a template."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    def dataset(**_: Any) -> dict[str, Any]:
        return {"test": Dataset.from_list(list(documents))}

    whole = {
        "task": "local",
        "custom_dataset": dataset,
        "test_split": "test",
        "output_type": output_type,
        "num_fewshot": 0,
        "metadata": {"version": 1},
        **config,
    }
    with undisturbed():
        return ConfigurableTask(config=whole)


def ask(
    network: Network,
    task: Any,
    n: int,
    tick: Tick,
    *,
    picked: Sequence[int] | None = None,
    chat: bool = False,
    seed: int | None = None,
) -> tuple[Mapping[str, Any], list[dict[str, Any]]]:
    """Metrics by "name,filter", and what lm-eval logs of each of `n` documents, in the documents' order.

    `picked`: numbers of the documents to use, ascending; None for all. `chat`: the prompt as a user message in the
    model's own chat template. `tick` is called for every document. `ModelError` if the model cannot run the task,
    `RunError` if lm-eval fails or the model's outputs are not finite.
    """
    import lm_eval

    if chat and not getattr(network.tokenizer, "chat_template", None):
        raise ModelError(
            f"model '{network.name}': its tokenizer has no chat template", "ask it without one: chat: false"
        )
    try:
        with undisturbed(SEED if seed is None else seed):
            name = task.task_name
            check_finite(network)
            task.set_fewshot_seed(seed=SEED)
            out = lm_eval.evaluate(
                lm=_language_model()(network, n, tick),
                task_dict={"tasks": {name: task}},
                samples=None if picked is None else {name: list(picked)},
                bootstrap_iters=RESAMPLES,
                apply_chat_template=chat,
            )
    except MergebenchError:
        raise
    except Exception as error:  # lm-eval raises whatever its parts raise
        if out_of_memory(error):
            raise
        raise RunError(f"model '{network.name}': lm-eval failed: {first_line(error)}") from None
    samples = out["samples"][name]
    first = samples[0]["filter"]  # a task with several ways to read an answer logs each document once for each
    return out["results"][name], sorted((s for s in samples if s["filter"] == first), key=lambda s: s["doc_id"])


@cache
def _language_model() -> Any:
    """The class; created on first use, because it needs lm-eval."""
    from lm_eval.models.huggingface import HFLM

    class Asked(HFLM):  # type: ignore[misc]
        """lm-eval's transformers model, on a `Network`: the longest requests first, as many at once as fit."""

        def __init__(self, network: Network, documents: int, tick: Tick) -> None:
            take_settings(network)
            super().__init__(pretrained=network.module, tokenizer=network.tokenizer, backend="causal")
            if self.max_length < 1:  # XLNet's config says -1 for no limit
                self._max_length = HFLM._DEFAULT_MAX_LENGTH
            self._name, self._documents, self._tick = network.name, documents, tick

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            lengths = [self._length("".join(request.args)) for request in requests]
            return self._in_parts(HFLM.loglikelihood, requests, lengths, READ_TOKENS)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            lengths = [self._length(request.args[0]) for request in requests]
            return self._in_parts(HFLM.loglikelihood_rolling, requests, lengths, READ_TOKENS)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            how = [request.args[1] for request in requests]
            room = [one.get("max_gen_toks", self.max_gen_toks) for one in how]
            lengths = [self._length(request.args[0]) + more for request, more in zip(requests, room, strict=True)]
            drawn = any(one.get("do_sample") or one.get("temperature") for one in how)
            return self._in_parts(HFLM.generate_until, requests, lengths, WRITTEN_TOKENS, in_turn=drawn)

        def _length(self, text: str) -> int:
            tokens = self.tok_encode(text)
            if not tokens:
                raise no_token(self._name, text)  # its likelihood would be 1
            return len(tokens) + 1

        def _in_parts(
            self,
            answer: Callable[[Any, list[Any]], list[Any]],
            requests: list[Any],
            lengths: list[int],
            room: dict[str, int],
            in_turn: bool = False,  # for tasks that draw from the shared random generator
        ) -> list[Any]:
            parts = batches(lengths, room["cpu" if self.device.type == "cpu" else "cuda"])
            idle: SimpleQueue[Any] = SimpleQueue()  # a tokenizer does not serve two threads at once
            done = told = 0

            def work(part: list[int]) -> list[Any]:
                try:
                    one = idle.get_nowait()
                except Empty:
                    one = copy(self)
                    one.tokenizer = deepcopy(self.tokenizer)
                one.batch_size_per_gpu = len(part)
                found = answer(one, [requests[i] for i in part])
                idle.put(one)
                return found

            def tick(items: int) -> None:
                nonlocal done, told
                done += items
                now = done * self._documents // len(requests)
                self._tick(now - told)
                told = now

            answers: list[Any] = [None] * len(requests)
            for part, found in zip(parts, run_batches(work, parts, self.device, tick, in_turn), strict=True):
                for i, one in zip(part, found, strict=True):
                    answers[i] = one
            return answers

    return Asked


@contextmanager
def undisturbed(seed: int | None = None) -> Iterator[None]:
    """Silence progress bars, logs and prints inside the context, and seed the random generators; restores them
    afterwards."""
    import numpy
    from tqdm import tqdm

    begin, stored = tqdm.__init__, vars(tqdm)["__init__"]  # another library may have put a descriptor there

    def silent(self: Any, *args: Any, **keys: Any) -> None:
        begin(self, *args, **(keys | {"disable": True}))

    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    state, array_state, workers = random.getstate(), numpy.random.get_state(), os.environ.get("DISABLE_MULTIPROC")
    try:
        tqdm.__init__ = silent
        os.environ["DISABLE_MULTIPROC"] = "1"  # standard errors are resampled in this process
        for name in LOGGERS:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        with quiet(), redirect_stdout(io.StringIO()), torch.random.fork_rng():
            if seed is not None:
                random.seed(0)  # lm-eval's own default too
                numpy.random.seed(seed)
                torch.manual_seed(seed)
            yield
    finally:
        tqdm.__init__ = stored
        random.setstate(state)
        numpy.random.set_state(array_state)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if workers is None:
            os.environ.pop("DISABLE_MULTIPROC", None)
