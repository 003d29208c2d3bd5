"""AdaLoRA (arXiv:2303.10512): the budget, the importance and the masks against an allocator written from the paper's
formulas; a killed run; what can never allocate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoders import write_encoder
from language import write_decoder
from safetensors.torch import load_file
from torch import Generator
from training.trainable import classify

from mergebench.adapters.adalora import allocation
from mergebench.adapters.stored import read_stored
from mergebench.deltas.open import open_model
from mergebench.errors import RecipeError
from mergebench.networks.network import Network
from mergebench.systems.adalora import AdaLora, Params, adalora
from mergebench.training import load_config, once, train
from mergebench.training.attached import Base

pytestmark = pytest.mark.usefixtures("one_thread")
TWO = ["encoder.layer.0.attention.self.query.weight", "encoder.layer.1.intermediate.dense.weight"]
# of two matrices from rank 12 to 8: 100 steps, the budget falls from 10 to 80
BUDGET = {10: 24, 11: 23, 20: 21, 30: 18, 45: 17, 60: 16, 79: 16, 80: 16, 81: 16, 100: 16}


def put_on(model: Path, steps: int, auto: str = "AutoModel", **params: Any) -> AdaLora:
    network = Network(open_model(str(model)), auto, torch.device("cpu"), packed=False)
    base = Base(open_model(str(model)), network, Generator().manual_seed(0), steps)
    attached = adalora(base, Params(**params))
    assert isinstance(attached, AdaLora)
    return attached


class Reference:
    """The allocator of eq. 8 to 12 in float64: means of the importance, scores of the triplets."""

    def __init__(self, values: dict[str, Any], steps: int, before: int, after: int, target: int, delta_t: int) -> None:
        self.values, self.steps, self.before, self.after = values, steps, before, after
        self.target, self.delta_t = target, delta_t
        self.mean = {name: np.zeros_like(one) for name, one in values.items()}
        self.apart = {name: np.zeros_like(one) for name, one in values.items()}
        self.modules = [name[: -len(".lora_E.default")] for name in values if ".lora_E." in name]
        self.kept: set[tuple[str, int]] = set()

    def budget(self, t: int) -> int:
        first, last = (rank * len(self.modules) for rank in (12, self.target))
        done = min(max((t - self.before) / (self.steps - self.after - self.before), 0), 1)
        return int(last + (first - last) * (1 - done) ** 3)

    def step(self, t: int, gradients: dict[str, Any]) -> None:
        end = self.steps - self.after
        if t < end:
            for name, value in self.values.items():
                now = np.abs(value * gradients[name])
                self.mean[name] = 0.85 * self.mean[name] + 0.15 * now
                self.apart[name] = 0.85 * self.apart[name] + 0.15 * np.abs(now - self.mean[name])
        if (self.before < t < end and t % self.delta_t == 0) or t == end:
            scores = {(m, i): self.score(m, i) for m in self.modules for i in range(12)}
            self.kept = set(sorted(scores, key=lambda one: -scores[one])[: self.budget(t)])
            self.mask()
        elif t > end:
            self.mask()

    def score(self, module: str, triplet: int) -> float:
        a, e, b = (self.mean[n] * self.apart[n] for n in (f"{module}.lora_{factor}.default" for factor in "AEB"))
        return float(e[triplet, 0] + a[triplet].mean() + b[:, triplet].mean())

    def mask(self) -> None:
        for module in self.modules:
            lost = [i for i in range(12) if (module, i) not in self.kept]
            self.values[f"{module}.lora_E.default"][lost] = 0


@pytest.mark.parametrize("delta_t", [1, 7])
def test_a_stream_of_gradients_step_by_step(tmp_path: Path, delta_t: int) -> None:
    attached = put_on(write_encoder(tmp_path / "base"), 100, targets=TWO, warmup=0.1, final=0.2, delta_t=delta_t)
    named = {name.removeprefix("base_model.model."): one for name, one in attached.parameters.items()}
    reference = Reference(
        {n: one.detach().double().numpy().copy() for n, one in named.items()}, 100, 10, 20, 8, delta_t
    )
    stream = Generator().manual_seed(1)
    for t in range(1, 101):
        gradients = {name: torch.randn(one.shape, generator=stream) for name, one in named.items()}
        for name in (name for name in gradients if "intermediate" in name):
            gradients[name] *= 2  # so that it keeps more
        with torch.no_grad():
            for name, one in named.items():
                one.grad = gradients[name]
                one -= 0.1 * gradients[name]
                reference.values[name] -= 0.1 * gradients[name].double().numpy()

        attached.after_step(t)
        reference.step(t, {name: one.double().numpy() for name, one in gradients.items()})

        left = 0
        for name, one in named.items():
            assert torch.allclose(one.double(), torch.from_numpy(reference.values[name]), atol=1e-4)
            assert np.allclose(attached.state[f"mean.{name}"].numpy(), reference.mean[name], rtol=1e-4, atol=1e-6)
            assert np.allclose(attached.state[f"uncertainty.{name}"].numpy(), reference.apart[name], 1e-4, 1e-6)
            left += int(torch.count_nonzero(one)) if ".lora_E." in name else 0
            if ".lora_E." in name:
                assert ((one == 0).numpy() == (reference.values[name] == 0)).all()
        assert reference.budget(t) == BUDGET.get(t, reference.budget(t))
        if delta_t == 1 or t >= 80:
            assert left == reference.budget(t)
        assert attached.settled(t) == (t >= 80)
    ranks = {module: sum(one == module for one, _ in reference.kept) for module in reference.modules}
    assert attached.about()["ranks"] == ranks and sum(ranks.values()) == 16 and set(ranks.values()) != {8}
    attached.save(tmp_path / "saved")
    assert allocation(read_stored(tmp_path / "saved")).ranks == ranks


def test_the_importance_of_one_element(tmp_path: Path) -> None:
    attached = put_on(write_encoder(tmp_path / "base"), 100, targets=TWO)
    state = attached.state
    for step, (gradient, mean, apart) in enumerate([(2.0, 0.3, 0.255), (1.0, 0.405, 0.306)], 1):
        for one in attached.parameters.values():
            one.data.fill_(1)
            one.grad = torch.full_like(one, gradient)
        attached.after_step(step)
        for name in attached.parameters:
            own = name.removeprefix("base_model.model.")
            assert torch.allclose(state[f"mean.{own}"], torch.tensor(mean))
            assert torch.allclose(state[f"uncertainty.{own}"], torch.tensor(apart))


def test_the_penalty_is_the_one_that_peft_adds_to_its_loss(tmp_path: Path) -> None:
    attached = put_on(
        write_decoder(tmp_path / "base"), 100, "AutoModelForCausalLM", orthogonality=0.3, init_rank=4, target_rank=2
    )
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        added = attached.model.base_model(ids, labels=ids).loss - attached.model.base_model.model(ids, labels=ids).loss
    penalty = attached.penalty()
    assert penalty is not None and penalty.requires_grad
    assert float(penalty.detach()) == pytest.approx(float(added), rel=1e-5)


def trained(folder: Path, out: str, *, resume: bool = False, stop: int | None = None, **more: Any) -> Any:
    def progress(what: str, done: int, total: int) -> None:
        if done == stop:
            raise KeyboardInterrupt

    delta = {"kind": "adalora", "targets": ["*query.weight", "*value.weight"], "init_rank": 4, "target_rank": 2}
    config = classify(folder, **{"delta": delta, "max_steps": 8, "every": 2, **more})
    return train(load_config(config), folder / out, device="cpu", resume=resume, progress=progress)


@pytest.mark.slow
def test_killed_and_resumed_gives_the_same_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    students, kept = [], once.fit
    monkeypatch.setattr(once, "fit", lambda student, *a, **more: students.append(student) or kept(student, *a, **more))
    whole = trained(tmp_path, "whole").runs[0]
    for stop in (3, 7):  # while the budget falls, and after
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path, f"killed-{stop}", stop=stop)
        again = trained(tmp_path, f"killed-{stop}", resume=True).runs[0]
        assert again["about"] == whole["about"] and again["history"] == whole["history"]
        states = [student.attached.state for student in (students[0], students[-1])]
        assert all(torch.equal(one, states[1][name]) for name, one in states[0].items())
        assert any(one.any() for name, one in states[0].items() if name.startswith("mean."))
        a, b = (
            load_file(tmp_path / out / "adalora/seed-0/adapter_model.safetensors")
            for out in ("whole", f"killed-{stop}")
        )
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_validation_chooses_among_adapters_of_the_final_budget(tmp_path: Path) -> None:
    # nothing is learnt, so that the first of the equal scores is the best
    run = trained(tmp_path, "out", every=1, lr=1e-12, head_lr=1e-12, warmup=0).runs[0]
    assert len({point["validation"] for point in run["history"] if "validation" in point}) == 1
    assert run["about"]["triplets"] == {"initial": 16, "target": 8, "left": 8}


def test_a_matrix_without_part_in_the_loss_keeps_no_rank(tmp_path: Path) -> None:
    delta = {
        "kind": "adalora", "targets": ["*query.weight", "pooler.dense.weight"], "init_rank": 4, "target_rank": 2,
        "orthogonality": 0,
    }  # fmt: skip
    run = trained(tmp_path, "out", delta=delta).runs[0]
    assert run["about"]["ranks"]["pooler.dense"] == 0
    config = json.loads((tmp_path / "out/adalora/seed-0/adapter_config.json").read_text())
    assert config["rank_pattern"]["pooler.dense.lora_E"] == [False] * 4


@pytest.mark.parametrize(
    ("params", "steps", "message", "hint"),
    [
        ({"init_rank": 8}, 100, "target_rank: 8: init_rank is 8, nothing would be taken away", "init_rank: 12"),
        (
            {"warmup": 0.5, "final": 0.5}, 100,
            "adalora: the budget would not fall: of 100 steps 50 are before it (warmup: 0.5), 50 after it "
            "(final: 0.5), and none of those between is a multiple of 1 (delta_t)",
            "more epochs, or smaller warmup and final",
        ),
        (
            {"delta_t": 10}, 20,
            "adalora: the budget would not fall: of 20 steps 2 are before it (warmup: 0.1), 10 after it (final: 0.5), "
            "and none of those between is a multiple of 10 (delta_t)",
            "delta_t: 9, or less",
        ),
        ({"init_rank": 17}, 100, "rank: 17: encoder.layer.0.attention.output.dense.weight is [16, 16]", "at most 16"),
    ],
)  # fmt: skip
def test_what_can_never_allocate_is_refused(
    tmp_path: Path, params: dict[str, Any], steps: int, message: str, hint: str
) -> None:
    with pytest.raises(RecipeError) as error:
        put_on(write_encoder(tmp_path / "base"), steps, **params)
    assert (error.value.message, error.value.hint) == (message, hint)


def test_the_scale(tmp_path: Path) -> None:
    """alpha / init_rank, of which alpha is twice the rank where it is not given."""
    base = write_encoder(tmp_path / "base")
    for alpha, scale in ((None, 2.0), (3.0, 0.75)):
        attached = put_on(base, 100, targets=TWO, init_rank=4, target_rank=2, alpha=alpha)
        with torch.no_grad():
            for name, one in attached.parameters.items():
                if ".lora_E" in name:
                    one.fill_(1)
        attached.save(tmp_path / f"{alpha}")
        before, after = (open_model(f"{base}{more}").state_dict() for more in ("", f"+{tmp_path / str(alpha)}"))
        for target in TWO:
            module = f"base_model.model.{target.removesuffix('.weight')}"
            a, b = (attached.parameters[f"{module}.lora_{side}.default"].detach() for side in "AB")
            torch.testing.assert_close(after[target] - before[target], scale * b @ a, rtol=1e-4, atol=1e-5)


def test_sessions_have_no_common_schedule(tmp_path: Path) -> None:
    config = classify(tmp_path, delta={"kind": "adalora", "init_rank": 4, "target_rank": 2})
    config["objective"] = {"self-training": {"unlabelled": config["task"]["train"]}}
    with pytest.raises(RecipeError) as error:
        train(load_config(config), tmp_path / "out", device="cpu")
    assert "objective: self-training trains several times, and adalora counts the steps of one" in error.value.message
    assert "delta: {kind: list}" in str(error.value.hint) and not (tmp_path / "out").exists()


def test_pefts_own_type_is_sent_to_the_kind(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as error:
        train(load_config(classify(tmp_path, peft={"peft_type": "adalora"})), tmp_path / "out", device="cpu")
    assert "ADALORA" in error.value.message and "delta: {kind: adalora" in str(error.value.hint)
