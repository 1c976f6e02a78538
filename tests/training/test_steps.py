"""What a step is made of: its loader batches, its divisor, its samples; compared with what the optimizer does."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_eoss import (
    GradientNoiseInjector,
    GradientNoiseMonitor,
    LearningRateRescaler,
    SharpnessMonitor,
    SpectralDensityMonitor,
)
from lightning_eoss.curvature.batches import num_samples_of
from tests.problems import top
from tests.runs import Regressor, assert_same, fit, samples, seeded, state_of

RNG = torch.Generator().manual_seed(0)
INPUTS = torch.randn(60, 3, generator=RNG, dtype=torch.float64) * torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)


def hessian(inputs: Tensor) -> Tensor:
    """Of half the mean squared error of a linear model."""
    return inputs.T @ inputs / len(inputs)


class Linear(Regressor):
    """A linear model without a bias, under plain SGD; its targets are 0, so its weights are its error."""

    def __init__(self, learning_rate: float = 1e-3) -> None:
        super().__init__(nn.Linear(3, 1, bias=False).double(), learning_rate)
        self.seen: list[Tensor] = []  # weights before each batch

    def loss(self, batch: Any) -> Tensor:
        return self.net(batch[0]).square().mean() / 2

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def on_train_start(self) -> None:
        self.seen.append(self.net.weight.detach().clone())

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(self.net.weight.detach().clone())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)


def data(num_samples: int) -> TensorDataset:
    return TensorDataset(INPUTS[:num_samples])


def exact(every_n_train_steps: int = 1, **options: Any) -> SharpnessMonitor:
    return SharpnessMonitor(every_n_train_steps=every_n_train_steps, rel_error=1e-3, num_batches=8, **options)


# ---- the windows of an accumulation ----------------------------------------------------------------------------------


class Stream(IterableDataset[Any]):
    """Of a length that nobody knows."""

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples

    def __iter__(self) -> Iterator[Any]:
        return iter(data(self.num_samples))


@pytest.mark.parametrize(
    ("num_samples", "accumulated", "options", "parts"),
    [
        (12, 8, {}, [4, 4, 4]),
        (11, 8, {}, [4, 4, 3]),
        (12, 3, {}, [4, 4, 4]),
        (60, 8, {"limit_train_batches": 2}, [4, 4]),
        (12, 8, {"stream": True}, [4, 4, 4]),
    ],
    ids=["always short", "with a short batch", "full", "limited", "unknown length"],
)
@pytest.mark.parametrize("ratio", [0.5, 1.1])
def test_the_edge_ratio_is_that_of_the_step_taken(
    num_samples: int, accumulated: int, options: dict[str, Any], parts: list[int], ratio: float, tmp_path: Path
) -> None:
    """Each step takes all samples: along the top eigenvector it multiplies the error by 1 - 2 ratio."""
    pieces, options = INPUTS[: sum(parts)].split(parts), dict(options)
    stepped = torch.stack([hessian(each) for each in pieces]).sum(0) / accumulated
    module = Linear(2 * ratio / top(stepped))
    stream = options.pop("stream", False)
    dataset: Any = Stream(num_samples) if stream else data(num_samples)
    watch = exact(dataloader=[[each] for each in pieces] if stream else None)
    rescaler = LearningRateRescaler()
    options = {"accumulate_grad_batches": accumulated, "max_epochs": 3, **options}
    fit(tmp_path, module, DataLoader(dataset, batch_size=4), watch, rescaler, **options)

    weights = [module.seen[place * len(parts)] for place in range(3)]
    direction = torch.linalg.eigh(stepped)[1][:, -1]
    before, after = (float(weight[0] @ direction) for weight in weights[:2])
    assert after / before == pytest.approx(1 - 2 * ratio, rel=1e-6)  # so much for the truth
    for point in watch.history:
        if num_samples % 4 == 0:  # else batches of other samples have other Hessians
            assert point["sharpness/edge_ratio"] == pytest.approx(ratio, rel=1e-3)
            assert point["sharpness/edge_ratio_FullBS"] == pytest.approx(ratio, rel=1e-3)
        assert point["sharpness/current_batch"] == pytest.approx(top(stepped), rel=1e-3)
        assert point["sharpness/batch_size"] == sum(parts)
    assert rescaler.state_dict()["size"] == sum(parts)
    assert rescaler.history[0]["learning_rate/scale"] == 1


def test_a_short_part_of_a_step_weighs_as_much_as_the_others(tmp_path: Path) -> None:
    """Eleven samples in parts of 4, 4 and 3, in all orders: the mean of the top of the sums over the draws."""
    watch = SharpnessMonitor(every_n_train_steps=1, rel_error=1e-4, num_batches=400)
    fit(tmp_path, Linear(), DataLoader(data(11), batch_size=4), watch, max_epochs=1, accumulate_grad_batches=8)
    generator, values = torch.Generator().manual_seed(1), []
    for _ in range(4000):
        order = torch.randperm(11, generator=generator)
        values.append(top(torch.stack([hessian(INPUTS[each]) for each in order.split(4)]).sum(0) / 8))
    found, spread = watch.history[0], torch.tensor(values)
    stderr = float(spread.std()) * (1 / 400 + 1 / 4000) ** 0.5
    assert abs(found["sharpness/MiniBS"] - float(spread.mean())) < 4 * stderr
    assert found["sharpness/FullBS"] == pytest.approx(3 / 8 * top(hessian(INPUTS[:11])), rel=1e-3)


def test_a_short_last_step_is_what_it_is(tmp_path: Path) -> None:
    """Five batches, three a step: the second step of each epoch has two, and the divisor three."""
    watch, full = exact(), top(hessian(INPUTS[:20]))
    rescaler = LearningRateRescaler(max_edge_ratio=1.2)
    noise = GradientNoiseMonitor(every_n_train_steps=1)
    density = SpectralDensityMonitor(every_n_train_steps=1)
    callbacks = (watch, rescaler, noise, density)
    fit(tmp_path, Linear(), DataLoader(data(20), batch_size=4), *callbacks, accumulate_grad_batches=3)
    for number, point in enumerate(watch.history):
        share = (1, 2 / 3)[number % 2]
        assert point["sharpness/FullBS"] == pytest.approx(share * full, rel=1e-3)
        assert point["sharpness/batch_size"] == (12, 8)[number % 2]
        assert density.history[number]["spectrum/largest"] == pytest.approx(share * full, rel=1e-3)
    norms = [point["gradient_noise/gradient_norm_squared"] for point in noise.history]
    assert len(norms) == 4
    assert rescaler.state_dict()["size"] == 12 and {each["learning_rate/scale"] for each in rescaler.history} == {1}


def test_the_usual_step_of_an_epoch_of_unknown_length(tmp_path: Path) -> None:
    """Six batches, four a step: 4, 2, 4, 2; what the rule goes by is the four."""
    rescaler = LearningRateRescaler(base_batch_size=32)
    fit(tmp_path, Linear(), DataLoader(Stream(24), batch_size=4), rescaler, accumulate_grad_batches=4)
    assert rescaler.state_dict()["size"] == 16
    assert {each["learning_rate/scale"] for each in rescaler.history[1:]} == {0.5}


def test_an_accumulation_without_backward_passes_is_no_batch_size(tmp_path: Path) -> None:
    """SWA ends with an epoch that updates BatchNorm, and sets the accumulation to the epoch's batches and one."""

    def trained(name: str, *callbacks: Any) -> tuple[dict[str, Any], list[Any]]:
        seeded()
        module = Regressor(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2)))
        averaging = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1, device=None)
        loader = DataLoader(samples(32), batch_size=4)
        trainer = fit(tmp_path / name, module, loader, averaging, *callbacks, max_epochs=3, gradient_clip_val=None)
        return {**state_of(trainer), "loops": None}, list(callbacks)

    stepped: list[bool] = []

    class Injector(GradientNoiseInjector):
        def _gradient(self, trainer: Any, objective: Any) -> Tensor:
            stepped.append(trainer.fit_loop._skip_backward)
            return super()._gradient(trainer, objective)

    trained("injected", Injector(noise="none"))
    assert stepped == [False] * 24  # three epochs; the fourth updates BatchNorm
    rescaler = LearningRateRescaler(base_batch_size=4)
    watch = SharpnessMonitor(every_n_train_steps=8, num_batches=2)
    watched, _ = trained("watched", rescaler, watch)
    alone, _ = trained("alone")
    assert_same(watched["parameters"], alone["parameters"])
    assert_same(watched["buffers"], alone["buffers"])
    assert rescaler.state_dict()["size"] == 4
    assert {each["learning_rate/scale"] for each in rescaler.history} == {1}


# ---- samplers whose batches differ in size ---------------------------------------------------------------------------


LENGTHS = [2, 2, 2, 2, 2, 2, 2, 2, 4, 4, 4, 4, 8, 8, 8, 8, 8, 8, 8, 8]  # tokens of each sample, 16 make a batch


class Tokens(Sampler[list[int]]):
    """Batches of 16 tokens, the short samples first, or in a random order."""

    def __init__(self, *, shuffled: bool = False) -> None:
        self.shuffled = shuffled

    def __iter__(self) -> Iterator[list[int]]:
        batches, batch = list[list[int]](), list[int]()
        for index in range(len(LENGTHS)):
            batch.append(index)
            if sum(LENGTHS[each] for each in batch) == 16:
                batches.append(batch)
                batch = []
        order = torch.randperm(len(batches)).tolist() if self.shuffled else range(len(batches))
        return iter([batches[place] for place in order])

    def __len__(self) -> int:
        return 6


class Nominal(BatchSampler):
    """What it calls its batch size is no number of samples."""

    def __init__(self) -> None:
        super().__init__(range(20), batch_size=32, drop_last=False)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(Tokens())

    def __len__(self) -> int:
        return 6


@pytest.mark.parametrize("sampler", [Tokens(), Tokens(shuffled=True), Nominal()], ids=["sorted", "shuffled", "nominal"])
def test_mini_bs_is_the_mean_over_the_samplers_own_batches(sampler: Any, tmp_path: Path) -> None:
    """Each as often as training meets it."""
    watch = exact()
    fit(tmp_path, Linear(), DataLoader(data(20), batch_sampler=sampler), watch, max_steps=1)
    values = [top(hessian(INPUTS[each])) for each in Tokens()]
    assert len(values) == 6 and {len(each) for each in Tokens()} == {8, 4, 2}
    (point,) = watch.history
    assert watch.reading is not None
    drawn = sorted(2000 * ratio for ratio in watch.reading.mini_batch.values)  # its other epochs have nothing new
    assert drawn == pytest.approx(sorted(values), rel=1e-3)
    assert point["sharpness/batch_size"] == 3  # of 20 samples in 6 batches
    assert point["sharpness/FullBS"] == pytest.approx(top(hessian(INPUTS[:20])), rel=1e-3)


def test_all_of_an_epochs_batches_have_their_say(tmp_path: Path) -> None:
    watch = SharpnessMonitor(every_n_train_steps=1, rel_error=1e-6, num_batches=6)
    fit(tmp_path, Linear(), DataLoader(data(20), batch_sampler=Tokens()), watch, max_steps=1)
    values = [top(hessian(INPUTS[each])) for each in Tokens()]
    assert watch.history[0]["sharpness/MiniBS"] == pytest.approx(sum(values) / 6, rel=1e-3)


class Uneven(Sampler[list[int]]):
    """Batches of two and of one, in their order: their mean, rounded, is none of them."""

    def __iter__(self) -> Iterator[list[int]]:
        return iter([[0, 1], [2, 3], [4, 5], [6, 7], [8], [9], [10], [11]])

    def __len__(self) -> int:
        return 8


def test_all_batches_of_a_sampler_make_a_step_that_is_always_short(tmp_path: Path) -> None:
    """Eight batches and an accumulation of sixteen."""
    watch, rescaler = exact(), LearningRateRescaler()
    loader = DataLoader(data(12), batch_sampler=Uneven())
    fit(tmp_path, Linear(), loader, watch, rescaler, max_epochs=2, accumulate_grad_batches=16)
    expected = top(torch.stack([hessian(INPUTS[each]) for each in Uneven()]).sum(0) / 16)
    for point in watch.history:
        assert point["sharpness/MiniBS"] == pytest.approx(expected, rel=1e-3)
        assert point["sharpness/current_batch"] == pytest.approx(expected, rel=1e-3)
        assert point["sharpness/batch_size"] == 12
    assert rescaler.state_dict()["size"] == 12


@pytest.mark.parametrize("replacement", [True, False])
def test_a_sampler_may_draw_more_samples_than_there_are(replacement: bool, tmp_path: Path) -> None:
    """Sixteen batches of two out of eight samples make a step of thirty-two."""
    if replacement:
        sampler: Any = WeightedRandomSampler([1.0] * 8, 64)
    else:
        sampler = RandomSampler(data(8), num_samples=64)
    watch = SharpnessMonitor(every_n_train_steps=1, rel_error=1e-6, num_batches=200)
    rescaler = LearningRateRescaler()
    loader = DataLoader(data(8), 2, sampler=sampler)
    fit(tmp_path, Linear(), loader, watch, rescaler, max_steps=1, accumulate_grad_batches=16)
    generator, values = torch.Generator().manual_seed(1), []
    for _ in range(4000):
        drawn = torch.cat([torch.randperm(8, generator=generator) for _ in range(4)])
        drawn = torch.randint(8, (32,), generator=generator) if replacement else drawn
        values.append(top(hessian(INPUTS[drawn])))
    spread, (point,) = torch.tensor(values), watch.history
    stderr = float(spread.std()) * (1 / 200 + 1 / 4000) ** 0.5
    assert abs(point["sharpness/MiniBS"] - float(spread.mean())) <= 4 * stderr + 1e-3 * float(spread.mean())
    assert point["sharpness/batch_size"] == rescaler.state_dict()["size"] == 32


class Epochs(Sampler[int]):
    """Draws with replacement, from a generator that the number of the epoch makes, as DistributedSampler does."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randint(20, (20,), generator=torch.Generator().manual_seed(self.epoch)).tolist())

    def __len__(self) -> int:
        return 20


def test_epochs_of_a_sampler_differ_as_in_training(tmp_path: Path) -> None:
    """Five batches an epoch would else be all that is ever drawn."""
    watch = SharpnessMonitor(every_n_train_steps=1, rel_error=1e-6, num_batches=60)
    fit(tmp_path, Linear(), DataLoader(data(20), 4, sampler=Epochs()), watch, max_steps=1)
    assert watch.reading is not None
    assert len({round(value, 9) for value in watch.reading.mini_batch.values}) > 50
    generator = torch.Generator().manual_seed(1)
    drawn = [INPUTS[torch.randint(20, (4,), generator=generator)] for _ in range(4000)]
    spread, found = torch.tensor([top(hessian(each)) for each in drawn]), watch.history[0]["sharpness/MiniBS"]
    assert abs(found - float(spread.mean())) < 4 * float(spread.std()) * (1 / 60 + 1 / 4000) ** 0.5


class Long(Sampler[list[int]]):
    """The flat samples first, in more batches than anyone wants to solve."""

    def __iter__(self) -> Iterator[list[int]]:
        return ([number // 1000] for number in range(20_000))

    def __len__(self) -> int:
        return 20_000


def test_the_end_of_a_long_epoch_has_its_say(tmp_path: Path) -> None:
    order = INPUTS[:20].square().sum(1).argsort()
    watch = SharpnessMonitor(every_n_train_steps=1, rel_error=1e-6, num_batches=200)
    sorted_data = TensorDataset(INPUTS[order])
    fit(tmp_path, Linear(), DataLoader(sorted_data, batch_sampler=Long()), watch, max_steps=1)
    spread = INPUTS[:20].square().sum(1)
    assert abs(watch.history[0]["sharpness/MiniBS"] - float(spread.mean())) < 4 * float(spread.std()) / 200**0.5


def test_a_limit_holds_where_a_samplers_batches_differ(tmp_path: Path) -> None:
    """Three batches a step, of 3.4 samples in the mean: both sides call that ten."""

    class Sizes(Sampler[list[int]]):
        def __iter__(self) -> Iterator[list[int]]:
            return iter([[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]])

        def __len__(self) -> int:
            return 5

    watch, rescaler = exact(), LearningRateRescaler(max_edge_ratio=0.5)
    loader = DataLoader(data(17), batch_sampler=Sizes())
    fit(tmp_path, Linear(0.5), loader, watch, rescaler, max_epochs=2, accumulate_grad_batches=3)
    assert watch.history[0]["sharpness/edge_ratio_directional"] > 0.5
    assert watch.history[0]["sharpness/batch_size"] == 10
    assert min(point["learning_rate/scale"] for point in rescaler.history) < 0.9


def test_a_chosen_batch_size_is_drawn_from_the_sampler(tmp_path: Path) -> None:
    """Of one sample that is drawn always there is one batch, whatever its size."""
    weights = [1.0] + [0.0] * 19
    watch = exact(batch_size=7)
    fit(tmp_path, Linear(), DataLoader(data(20), 4, sampler=WeightedRandomSampler(weights, 20)), watch, max_steps=1)
    (point,) = watch.history
    assert point["sharpness/batch_size"] == 7
    assert point["sharpness/MiniBS"] == pytest.approx(top(hessian(INPUTS[:1])), rel=1e-3)
    with pytest.raises(ValueError, match=r"batch_size=7 cannot be made of .* a batch sampler that makes its own"):
        fit(tmp_path / "own", Linear(), DataLoader(data(20), batch_sampler=Tokens()), exact(batch_size=7))


def test_what_the_sampler_does_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    monkeypatch.setattr("lightning_eoss.training.watch.rank_zero_info", heard.append)
    fit(tmp_path, Linear(), DataLoader(data(20), batch_sampler=Tokens()), exact(), max_steps=1)
    said = " ".join(heard)
    assert "MiniBS from a copy of it" in said and "its batches have 2 to 8 samples, each counts as one step" in said


@pytest.mark.parametrize("shuffle", range(3))
def test_the_rate_follows_the_mean_of_the_samplers_batches(shuffle: int, tmp_path: Path) -> None:
    seeded(shuffle)
    rescaler, module = LearningRateRescaler(base_batch_size=16), Linear()
    fit(tmp_path, module, DataLoader(data(20), batch_sampler=Tokens(shuffled=True)), rescaler)
    assert [each["learning_rate/scale"] for each in rescaler.history] == pytest.approx([3.33 / 16] * 12)


def test_reading_a_samplers_sizes_leaves_no_trace(tmp_path: Path) -> None:
    def trained(name: str, *callbacks: Any) -> dict[str, Any]:
        seeded()
        sampler = Tokens(shuffled=True)
        return state_of(fit(tmp_path / name, Linear(), DataLoader(data(20), batch_sampler=sampler), *callbacks))

    assert_same(trained("watched", LearningRateRescaler(), exact(2)), trained("alone"))


# ---- how many samples a batch has ------------------------------------------------------------------------------------


@dataclass
class Graphs:
    """Some graphs as one: nodes first."""

    nodes: Tensor
    targets: Tensor


class Told(Graphs):
    @property
    def num_graphs(self) -> int:
        return len(self.targets)


class Slots:
    __slots__ = ("values",)

    def __init__(self, values: Tensor) -> None:
        self.values = values


def graphs(kind: Any, sizes: Sequence[int] = (16, 16, 6)) -> list[Any]:
    """Batches of graphs with one to five nodes each, the last one short."""
    batches, first = [], 0
    for size in sizes:
        nodes = torch.cat([INPUTS[index].expand(1 + index % 5, 3) for index in range(first, first + size)])
        batches.append(kind(nodes, INPUTS[first : first + size]))
        first += size
    return batches


class OnGraphs(Linear):
    def loss(self, batch: Any) -> Tensor:
        return self.net(batch["targets"] if isinstance(batch, dict) else batch.targets).square().mean() / 2


class Ready(Dataset[Any]):
    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __getitem__(self, index: int) -> Any:
        return self.batches[index]

    def __len__(self) -> int:
        return len(self.batches)


def as_dict(nodes: Tensor, targets: Tensor) -> dict[str, Tensor]:
    return {"nodes": nodes, "targets": targets}


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (graphs(Told)[0], 16),
        (graphs(Graphs)[0], None),
        (graphs(as_dict)[0], None),
        (Graphs(torch.zeros(5, 2), torch.zeros(5)), 5),
        ([torch.zeros(4, 2), None, "a", torch.tensor(1.0)], 4),
        ([torch.tensor(1.0), "a"], None),
        (pack_sequence([torch.zeros(5, 3)]), 1),
        ([pack_sequence([torch.zeros(5, 3), torch.zeros(2, 3)]), torch.zeros(2)], 2),
        (Slots(torch.zeros(3, 2)), 3),
    ],
)
def test_a_count_is_believed_where_all_agree(batch: Any, expected: int | None) -> None:
    assert num_samples_of(batch) == expected


@pytest.mark.parametrize(
    ("kind", "num_samples"),
    [(Told, None), (Graphs, lambda batch: len(batch.targets)), (as_dict, lambda batch: len(batch["targets"]))],
)
def test_full_bs_weighs_ready_batches_by_their_samples(kind: Any, num_samples: Any, tmp_path: Path) -> None:
    batches = graphs(kind)
    watch = exact(dataloader=batches, num_samples=num_samples)
    fit(tmp_path, OnGraphs(), DataLoader(Ready(batches), batch_size=None), watch, max_steps=1)
    assert watch.history[0]["sharpness/FullBS"] == pytest.approx(top(hessian(INPUTS[:38])), rel=1e-3)


@pytest.mark.parametrize("kind", [Graphs, as_dict])
def test_unknown_sizes_are_refused(kind: Any, tmp_path: Path) -> None:
    batches = graphs(kind)
    ready = DataLoader(Ready(batches), batch_size=None)
    with pytest.raises(MisconfigurationException, match=r"differ in length(.|\n)*Pass num_samples="):
        fit(tmp_path, OnGraphs(), ready, exact(dataloader=ready))
    with pytest.raises(MisconfigurationException, match=r"differ in length(.|\n)*Pass num_samples="):
        fit(tmp_path, OnGraphs(), ready, LearningRateRescaler())


@pytest.mark.parametrize(("kind", "num_samples"), [(Told, None), (Graphs, 16), (as_dict, 16)])
def test_the_rate_goes_by_graphs(kind: Any, num_samples: Any, tmp_path: Path) -> None:
    rescaler = LearningRateRescaler(base_batch_size=16, num_samples=num_samples)
    fit(tmp_path, OnGraphs(), DataLoader(Ready(graphs(kind)), batch_size=None), rescaler)
    assert {each["learning_rate/scale"] for each in rescaler.history} == {1}


def test_the_rate_follows_the_mean_of_the_last_epoch_where_no_sampler_tells(tmp_path: Path) -> None:
    """Batches of 4, 8 and 12, then of 8 in the mean."""
    rescaler = LearningRateRescaler(base_batch_size=8)
    loader = DataLoader(Ready(graphs(Told, (4, 8, 12))), batch_size=None)
    fit(tmp_path, OnGraphs(), loader, rescaler, max_epochs=3)
    assert [each["learning_rate/scale"] for each in rescaler.history] == [0.5] * 3 + [1] * 6


# ---- several loaders -------------------------------------------------------------------------------------------------


OTHERS = torch.randn(24, 3, generator=RNG, dtype=torch.float64) * 3


class Both(Linear):
    """Its batches hold those of two loaders, or None for one that is exhausted."""

    def loss(self, batch: Any) -> Tensor:
        one, other = batch["one"], batch["other"]
        terms = [scale * Linear.loss(self, each) for scale, each in ((1, one), (2, other)) if each is not None]
        return torch.stack(terms).sum()


def both(mode: Any, num_others: int, *, shuffle: bool) -> CombinedLoader:
    other = TensorDataset(OTHERS[:num_others])
    loaders = {"one": DataLoader(data(24), 4, shuffle=shuffle), "other": DataLoader(other, 2, shuffle=shuffle)}
    return CombinedLoader(loaders, mode)


@pytest.mark.parametrize(
    ("mode", "num_others", "ones", "weight"),
    [
        ("max_size_cycle", 6, 24, 2),
        ("max_size", 6, 24, 2 / 2),  # in three steps of six
        ("min_size", 12, 24, 2),
        ("min_size", 6, 12, 2),  # the others are not come to
    ],
)
def test_several_loaders_are_drawn_from_as_training_does(
    mode: Any, num_others: int, ones: int, weight: float, tmp_path: Path
) -> None:
    watch, rescaler = exact(), LearningRateRescaler()
    combined = both(mode, num_others, shuffle=False)
    fit(tmp_path, Both(), combined, watch, rescaler, max_steps=1)
    expected = hessian(INPUTS[:ones]) + weight * hessian(OTHERS[:num_others])
    (point,) = watch.history
    assert point["sharpness/FullBS"] == pytest.approx(top(expected), rel=1e-3)
    assert point["sharpness/current_batch"] == pytest.approx(
        top(hessian(INPUTS[:4]) + 2 * hessian(OTHERS[:2])), rel=1e-3
    )
    assert point["sharpness/batch_size"] == rescaler.state_dict()["size"] == 6


@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle"])
def test_batches_of_shuffled_loaders_are_random(mode: Any, tmp_path: Path) -> None:
    """Each of its own samples, each exhausted as often as training meets that."""
    watch = SharpnessMonitor(every_n_train_steps=1, rel_error=1e-6, num_batches=400)
    fit(tmp_path, Both(), both(mode, 6, shuffle=True), watch, max_steps=1)
    generator, values = torch.Generator().manual_seed(1), []
    for number in range(4000):
        one, other = (torch.randperm(count, generator=generator)[:size] for count, size in ((24, 4), (6, 2)))
        there = mode != "max_size" or number % 2 == 0
        values.append(top(hessian(INPUTS[one]) + 2 * there * hessian(OTHERS[other])))
    spread = torch.tensor(values)
    stderr = float(spread.std()) * (1 / 400 + 1 / 4000) ** 0.5
    assert abs(watch.history[0]["sharpness/MiniBS"] - float(spread.mean())) < 4 * stderr


@pytest.mark.filterwarnings("ignore:GradientNoiseMonitor. the loss of a batch was not found to be a mean")
def test_several_loaders_are_watched_without_a_trace(tmp_path: Path) -> None:
    def trained(name: str, *callbacks: Any) -> dict[str, Any]:
        seeded()
        return state_of(fit(tmp_path / name, Both(), both("max_size", 6, shuffle=True), *callbacks))

    watch, rescaler = exact(2), LearningRateRescaler()
    noise = GradientNoiseMonitor(every_n_train_steps=3)
    assert_same(trained("watched", watch, noise, rescaler), trained("alone"))
    assert len(watch.history) == 6 and len(noise.history) == 4


@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle"])
def test_the_same_loaders_as_a_dataloader_give_the_same(mode: Any, tmp_path: Path) -> None:
    """Each batch is a step, also where a loader is exhausted."""
    watches = exact(), exact(dataloader=both(mode, 6, shuffle=False))
    for number, watch in enumerate(watches):
        fit(tmp_path / str(number), Both(), both(mode, 6, shuffle=False), watch, max_steps=1)
    own, given = (watch.history[0] for watch in watches)
    assert own["sharpness/FullBS"] == pytest.approx(given["sharpness/FullBS"], rel=1e-3)
    assert own["sharpness/batch_size"] == given["sharpness/batch_size"] == 6


def test_a_list_of_one_loader_gives_lists(tmp_path: Path) -> None:
    class Listed(Linear):
        def loss(self, batch: Any) -> Tensor:
            (inner,) = batch
            return super().loss(inner)

    watch = exact()
    fit(tmp_path, Listed(), [DataLoader(data(24), 4)], watch, max_steps=1)
    assert watch.history[0]["sharpness/FullBS"] == pytest.approx(top(hessian(INPUTS[:24])), rel=1e-3)


def test_strings_among_tensors_make_no_difference(tmp_path: Path) -> None:
    named = [(inputs, f"sample {number}") for number, (inputs,) in enumerate(data(24))]
    watch = exact()
    fit(tmp_path, Linear(), DataLoader(named, 4), watch, max_steps=1)  # type: ignore[arg-type]
    assert watch.history[0]["sharpness/FullBS"] == pytest.approx(top(hessian(INPUTS[:24])), rel=1e-3)
