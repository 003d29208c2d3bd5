"""Generation: what a causal language model writes after prompts, by a scorer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mergebench.errors import RecipeError, RunError
from mergebench.evaluation import harness
from mergebench.evaluation.scorer import Continuation, Scorer
from mergebench.evaluation.task import Common, Prediction, Ready, Score, accuracy, asked, mean, task
from mergebench.networks.items import contents, read_rows
from mergebench.networks.loadable import Tick
from mergebench.networks.network import Network
from mergebench.parameters import param


@dataclass(frozen=True, kw_only=True)
class Params(Common):
    data: Path = param(help="JSON: an id and a prompt each, and a target where the scorer needs one")
    scorer: Scorer = param(help="exact-match, {regex: …}, {classifier: …, label: …}, {function: …}")
    id: str = param("id", "the column with the item's id")
    prompt: str = param("prompt", "the column with the prompt")
    target: str = param("target", "the column with what should be written")
    max_tokens: int = param(64, "tokens that are written at most", low=1)
    until: list[str] = param([], "texts that end a continuation, and are left out of it")
    temperature: float = param(0.0, "0: always the likeliest token; above: tokens are drawn", low=0)
    samples: int = param(1, "continuations drawn for each prompt; an item's score is their mean", low=1)
    chat: bool = param(False, "put the prompt as a user's message into the model's chat template")


@task(network="AutoModelForCausalLM")
def generation(p: Params) -> Ready:
    """Mean score of the continuations of prompts; the model reads the prompt as it stands."""
    versions = harness.needed("generation")
    if p.samples > 1 and not p.temperature:
        raise RecipeError(f"samples: {p.samples} of temperature 0 would all be the same", "temperature: 1")
    columns = (p.prompt, p.target) if p.scorer.target else (p.prompt,)
    rows = read_rows(p.data, p.id, columns, p.limit, p.seed)
    for row in rows:
        for name, value in zip(columns, row.values, strict=True):
            if not (isinstance(value, str) and value.strip()):
                raise RunError(f"{row.where}: {name} must be text, got {value!r:.60}")
    documents = [{"prompt": row.values[0], "target": (*row.values, "")[1]} for row in rows]
    drawn = {"do_sample": True, "temperature": p.temperature, "top_k": 0, "top_p": 1.0} if p.temperature else {}
    how = {"until": p.until, "max_gen_toks": p.max_tokens, "do_sample": False, **drawn}

    def measure(network: Network, tick: Tick) -> Score:
        local = harness.local_task(
            "generate_until",
            documents,
            doc_to_text=lambda document: document["prompt"],
            doc_to_target=lambda document: document["target"],
            generation_kwargs=dict(how),
            repeats=p.samples,
            metric_list=[{"metric": "bypass"}],
        )
        _, samples = harness.ask(network, local, len(rows), tick, chat=p.chat, seed=p.seed)
        texts = [text for sample in samples for text in sample["resps"][0]]
        items = [document for document in documents for _ in range(p.samples)]
        scores = p.scorer(
            Continuation(item["prompt"], text, item["target"]) for item, text in zip(items, texts, strict=True)
        )
        predictions = {}
        for i, row in enumerate(rows):
            part = slice(i * p.samples, (i + 1) * p.samples)
            predictions[row.id] = Prediction(texts[part][0], sum(scores[part]) / p.samples)
        if p.scorer.metric == "accuracy" and p.samples == 1:
            return accuracy(predictions)
        return mean(predictions, p.scorer.metric, p.scorer.direction)

    prompts, targets = ([one[name] for one in documents] for name in ("prompt", "target"))
    told = asked(rows, prompts, targets if p.scorer.target else ())
    files, versions = (p.data, *p.scorer.files), versions | p.scorer.versions
    return Ready(len(rows), measure, files=files, items=contents(rows), asked=told, versions=versions)
