"""Multiple choice: a causal language model finds one of several continuations the likeliest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergebench.errors import RunError, did_you_mean
from mergebench.evaluation import harness
from mergebench.evaluation.task import Common, Prediction, Ready, Score, accuracy, asked, task
from mergebench.networks.items import contents, read_rows
from mergebench.networks.loadable import Tick
from mergebench.networks.network import Network
from mergebench.parameters import param


@dataclass(frozen=True, kw_only=True)
class Params(Common):
    data: Path = param(help="JSON: an id, a question, choices and the answer each")
    id: str = param("id", "the column with the item's id")
    question: str = param("question", "the column with the question")
    choices: str = param("choices", "the column with the list of choices")
    answer: str = param("answer", "the column with the right choice: its text, or its number from 0")
    metric: str = param("acc", "acc: the likeliest choice; acc_norm: by letter of it", choices=("acc", "acc_norm"))


@task(network="AutoModelForCausalLM")
def multiple_choice(p: Params) -> Ready:
    """Accuracy of the likeliest choice after a question: the model reads the question, a space, the choice."""
    versions = harness.needed("multiple-choice")
    rows = read_rows(p.data, p.id, (p.question, p.choices, p.answer), p.limit, p.seed)
    documents = [_document(p, row.where, *row.values) for row in rows]

    def measure(network: Network, tick: Tick) -> Score:
        local = harness.local_task(
            "multiple_choice",
            documents,
            doc_to_text=lambda document: document["question"],
            doc_to_choice=lambda document: document["choices"],
            doc_to_target=lambda document: document["answer"],
            metric_list=[{"metric": p.metric, "aggregation": "mean", "higher_is_better": True}],
        )
        _, samples = harness.ask(network, local, len(rows), tick)
        return accuracy(
            {
                row.id: Prediction(likeliest(sample, document["choices"], p.metric), float(sample[p.metric]))
                for row, sample, document in zip(rows, samples, documents, strict=True)
            }
        )

    right = [document["choices"][document["answer"]] for document in documents]
    told = asked(rows, [document["question"] for document in documents], right)
    return Ready(len(rows), measure, files=(p.data,), items=contents(rows), asked=told, versions=versions)


def likeliest(sample: dict[str, Any], choices: list[str], metric: str) -> str:
    """The choice of the highest log-likelihood, for acc_norm divided by its letters; of equal ones the first."""
    values = [likelihood for likelihood, _ in sample["filtered_resps"]]
    if metric == "acc_norm":
        values = [value / len(choice) for value, choice in zip(values, choices, strict=True)]
    return choices[max(range(len(choices)), key=values.__getitem__)]


def _document(p: Params, where: str, question: object, choices: object, answer: object) -> harness.Document:
    """What lm-eval is given of a row: question, choices and the number of the right one."""
    if not (isinstance(question, str) and question.strip()):
        raise RunError(f"{where}: {p.question} must be text, got {question!r:.60}")
    if not (isinstance(choices, list) and all(isinstance(one, str) and one.strip() for one in choices)):
        raise RunError(f"{where}: {p.choices} must be a list of texts, got {choices!r:.60}")
    if len(set(choices)) != len(choices) or len(choices) < 2:
        raise RunError(f"{where}: {p.choices} must be two or more, all different, got {choices!r:.60}")
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    if type(answer) is not int or not 0 <= answer < len(choices):
        close = did_you_mean(answer, choices) if isinstance(answer, str) else f"a number from 0 to {len(choices) - 1}"
        raise RunError(f"{where}: {p.answer} {answer!r:.60} is none of the choices", close)
    return {"question": question, "choices": choices, "answer": answer}
