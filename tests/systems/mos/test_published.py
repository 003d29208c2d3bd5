"""The published code's semantics against what that code computed (recorded; tests/golden/mos_inputs.py)."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from mergebench.deltas.open import open_model
from mergebench.networks.features import Pooling
from mergebench.networks.network import Network
from mergebench.systems.mos.bank import Bank, BankWriter, read_bank
from mergebench.systems.mos.encoder import Encoder
from mergebench.systems.mos.feature_cache import Seen
from mergebench.systems.mos.manifest import AdapterKind, Features
from mergebench.systems.mos.merging import in_pass, merging_of
from mergebench.systems.mos.published_features import Drifting
from mergebench.systems.mos.statistics import of_classes
from mergebench.systems.mos.training import Items, Settings, train
from mergebench.systems.mos.variants import mos
from tests.models import hashes
from tests.systems.mos.conftest import about

sys.path.insert(0, str(Path(__file__).parents[2] / "golden"))
import mos_inputs as gold

STORED, ABOUT = gold.load()
CLOSE = {"atol": 1e-5, "rtol": 0}


class Pixels:
    """Images that are tensors already."""

    def __init__(self, values: Tensor) -> None:
        self.values, self.key = values, hashlib.sha256(values.numpy().tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.values)

    def lengths(self, network: Network) -> list[int]:
        return [4] * len(self)

    def rows(self, network: Network, positions: Sequence[int], pooling: Pooling) -> Tensor:
        states = network.backbone(pixel_values=self.values[list(positions)]).last_hidden_state
        return pooling(states, torch.ones(states.shape[:2]))


def quiet(items: int) -> None:
    pass


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    config = transformers.ViTConfig(
        hidden_size=gold.WIDTH, num_hidden_layers=gold.DEPTH, num_attention_heads=gold.HEADS, image_size=gold.IMAGE,
        intermediate_size=gold.MLP, patch_size=gold.PATCH, layer_norm_eps=1e-6,
    )  # fmt: skip
    model = transformers.ViTModel(config)
    missing, unexpected = model.load_state_dict(gold.backbone(), strict=False)
    assert not unexpected and all(name.startswith("pooler.") for name in missing)
    directory = tmp_path_factory.mktemp("vit")
    model.save_pretrained(directory)
    found = Encoder(Network(open_model(str(directory)), "AutoModel", torch.device("cpu")), Pooling("cls"), gold.SCALE)
    assert list(found.blocks) == gold.BLOCKS
    return found


@pytest.fixture
def bank(tmp_path: Path) -> Bank:
    """The golden adapters, head and prototypes as a bank; what else a bank holds is zero."""
    kind = AdapterKind(kind="bottleneck", scale=gold.SCALE, bottleneck=gold.RANK)
    features = Features(kind="image", pooling="cls", max_length=None)
    writer = BankWriter(tmp_path / "bank", about(adapter=kind, features=features, semantics="reference"))
    (weight, bias), rows = gold.head(), gold.prototypes()
    zero = torch.zeros(2, gold.WIDTH)
    for task in range(gold.TASKS):
        own = slice(2 * task, 2 * task + 2)
        writer.add(
            [str(2 * task), str(2 * task + 1)],
            adapter=gold.adapter(task),
            head=(weight[: own.stop], bias[: own.stop]),
            trained=(weight[own], bias[own]),
            statistics={"mean": zero, "variance": zero + 1, "count": torch.tensor([4, 4])},
            prototype=rows[own],
            frozen=zero,
        )
    return read_bank(tmp_path / "bank")


def test_the_goldens_are_of_these_inputs() -> None:
    assert ABOUT["inputs_sha256"] == gold.sha256()


def test_features_of_every_forward_are_the_published_ones(encoder: Encoder, bank: Bank) -> None:
    images = Pixels(gold.asked())
    every = torch.arange(gold.ASKED)
    drifting = Drifting(bank, encoder, images, gold.ASKED, quiet)
    for number in range(4):
        seen = drifting.evaluate(gold.TASKS - 1, every)
        torch.testing.assert_close(seen(-1, every), STORED["frozen"], **CLOSE)
        for task in range(gold.TASKS):
            torch.testing.assert_close(seen(task, every), STORED[f"features/{task}"][number], **CLOSE)
    first, second = STORED["features/1"][:2]
    assert (first - second).norm() > 0.05 * first.norm()  # a drift that the comparison would notice


def test_what_is_left_of_an_adapter_is_nine_tenths_to_the_number_of_blocks_and_passes() -> None:
    name = "layers.0.down.weight"
    mean = (gold.adapter(0)[name] + gold.adapter(1)[name]) / 2
    for passes, left in enumerate(STORED["shrunk/2"], 1):
        share = (left - mean).norm() / (gold.adapter(2)[name] - mean).norm()
        assert share.item() == pytest.approx(0.9 ** (gold.DEPTH * passes), abs=1e-6)
    assert all(torch.equal(one, gold.adapter(0)[name]) for one in STORED["shrunk/0"])


def test_evaluations_answer_as_the_published_ones_and_leave_the_bank_alone(encoder: Encoder, bank: Bank) -> None:
    before = hashes(bank.directory)
    every, answers = torch.arange(gold.ASKED), {}
    for batch, passes in gold.PASSES:
        drifting = Drifting(bank, encoder, Pixels(gold.asked()), batch, quiet)
        for number in range(passes):
            seen = drifting.evaluate(gold.TASKS - 1, every)
            found = mos(bank, gold.TASKS - 1, seen, every).classes
            assert found.tolist() == STORED[f"answers/{batch}/{number}"].tolist()
            answers[batch, number] = found
    assert (answers[16, 0] != answers[16, 1]).any() and (answers[16, 0] != answers[5, 0]).any()
    assert hashes(bank.directory) == before


def test_an_evaluation_is_of_its_order_and_asks_may_come_in_any(encoder: Encoder, bank: Bank) -> None:
    """Batch by batch through the forward passes, from the number that the manifest has."""
    images = gold.asked()[:10]
    order = torch.tensor([7, 2, 9, 0, 5, 3])
    drifting = Drifting(bank, encoder, Pixels(images), 4, quiet)
    drifting.forwards = [3, 3, 3]
    seen = drifting.evaluate(1, order)
    two, three = (Drifting(bank, encoder, Pixels(images), 10, quiet) for _ in range(2))
    two.forwards, three.forwards = [3] * 3, [4] * 3
    first, second = (one.evaluate(2, torch.arange(10)) for one in (two, three))

    assert drifting.forwards == [5, 5, 3]
    torch.testing.assert_close(
        seen(1, order.flip(0)[:3]), torch.cat([second(1, order.flip(0)[:2]), first(1, order[3:4])])
    )
    torch.testing.assert_close(seen(1, order[:4]), first(1, order[:4]))


@pytest.mark.parametrize("passes", [6, 40, 10**6])
def test_only_passes_that_change_nothing_are_taken_together(encoder: Encoder, bank: Bank, passes: int) -> None:
    every, images = torch.arange(4), Pixels(gold.asked()[:4])
    drifting = Drifting(bank, encoder, images, 4, quiet)
    drifting.forwards = [passes] * 3
    adapter = in_pass(bank.adapter(1), bank.adapter(0), gold.ALPHA, encoder.blocks, passes)
    expected = encoder.features(images, range(4), adapter, quiet)
    torch.testing.assert_close(drifting.evaluate(2, every)(1, every), expected, atol=1e-6, rtol=0)


def test_training_and_statistics_are_the_published_ones(encoder: Encoder) -> None:
    """Whole steps: loss, gradients, SGD, schedule, merges; then the passes that go on merging what is trained."""
    images, labels = gold.learnt()
    items = Items(Pixels(images), range(gold.LEARNT), labels)
    settings = Settings(gold.EPOCHS, gold.LEARNT, gold.LR, gold.WEIGHT_DECAY, gold.ORTHOGONALITY, dropout=0.0)
    merging = merging_of("reference", gold.adapter(0), gold.ALPHA, encoder.blocks)
    generator = torch.Generator().manual_seed(0)
    trained = train(encoder, items, gold.adapter(gold.TASKS), gold.means(), merging, settings, generator, quiet)

    for name, tensor in trained.adapter.items():
        torch.testing.assert_close(tensor, STORED[f"trained/{name}"], **CLOSE)
    torch.testing.assert_close(trained.weight, STORED["trained/weight"], **CLOSE)
    torch.testing.assert_close(trained.bias, STORED["trained/bias"], **CLOSE)

    left = {name: tensor.clone() for name, tensor in trained.adapter.items()}
    features = torch.empty(gold.LEARNT, gold.WIDTH)
    for label in (0, 1):
        for part in (labels == label).nonzero()[:, 0].split(gold.STATISTICS_BATCH):
            features[part] = encoder.features(items.inputs, part.tolist(), merging.forward(left), quiet)
    found = of_classes(features, labels, ["2", "3"], "covariance", generator)
    torch.testing.assert_close(found.mean, STORED["mean"], **CLOSE)
    torch.testing.assert_close(found.spread, STORED["covariance"], **CLOSE)
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, STORED[f"left/{name}"], **CLOSE)


def test_in_the_papers_semantics_answers_depend_on_nothing_but_the_item(encoder: Encoder, bank: Bank) -> None:
    """Not on the batch, the order or how often they were asked for."""
    before, images = hashes(bank.directory), Pixels(gold.asked())
    every = torch.arange(gold.ASKED)
    whole = Seen(bank, encoder, images, quiet)
    expected = mos(bank, gold.TASKS - 1, whole, every).classes
    for batch in (16, 5, 1):
        seen, order = Seen(bank, encoder, images, quiet), torch.randperm(gold.ASKED)
        for _ in range(2):
            found = torch.cat([mos(bank, gold.TASKS - 1, seen, part).classes for part in order.split(batch)])
            assert torch.equal(found, expected[order])
        for task in range(gold.TASKS):
            torch.testing.assert_close(seen(task, every), whole(task, every), **CLOSE)
    assert hashes(bank.directory) == before
