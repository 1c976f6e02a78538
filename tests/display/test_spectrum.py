"""The spectrum's picture and scalars."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from lightning_eoss.display import tags
from lightning_eoss.display.figures import spectrum_figure, write_spectrum
from lightning_eoss.display.scalars import spectrum_scalars
from lightning_eoss.measurements.spectrum import Spectra, measure_spectra
from lightning_eoss.theory.random_matrix import wigner_edge
from tests.problems import batch_norm, dense_gradient_and_hessian, made, mlp, pictures, squared_error


def found(**options: Any) -> Spectra:
    return measure_spectra(made(mlp), squared_error, pictures(), batch_size=4, steps=40, **options)


def test_scalars_are_those_of_the_dense_hessian() -> None:
    spectra = found()
    _, hessian = dense_gradient_and_hessian(
        made(mlp), squared_error, torch.utils.data.default_collate(list(pictures()))
    )
    eigenvalues = torch.linalg.eigvalsh(hessian)
    values = spectrum_scalars(spectra)
    assert values[tags.SPECTRUM_LARGEST] == pytest.approx(float(eigenvalues[-1]), rel=1e-6)
    assert values[tags.SPECTRUM_SMALLEST] == pytest.approx(float(eigenvalues[0]), rel=1e-6)
    lower, upper = (values[end] for end in tags.interval(tags.SPECTRUM_TRACE))
    assert lower <= float(eigenvalues.sum()) <= upper
    assert all(tag.startswith("spectrum/") for tag in values)


def test_the_picture_shows_both_spectra_and_what_noise_alone_would_do() -> None:
    spectra = found()
    (axes,) = spectrum_figure(spectra, title="epoch 3").axes
    assert axes.get_yscale() == "log" and axes.get_xlabel() == "eigenvalue"
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels[:2] == ["one batch (4)", "full batch (22)"]
    edge = wigner_edge(spectra.variance.mean, batch_size=4, dataset_size=22)
    drawn = sorted(line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == "--")
    assert drawn == pytest.approx([-edge, edge])
    stems = [len(each.get_segments()) for each in axes.collections]
    assert len(stems) == 2 and min(stems) > 5


def test_without_a_mean_nothing_is_predicted() -> None:
    spectra = measure_spectra(made(batch_norm).train(), squared_error, pictures(), batch_size=4, steps=5)
    (axes,) = spectrum_figure(spectra).axes
    assert not axes.lines


def test_tensorboard_gets_the_picture(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        write_spectrum(writer, found(num_probes=1), 7)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (image,) = events.Images(tags.SPECTRUM)
    assert image.step == 7 and image.width == 1200


def test_others_get_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_spectrum(object(), found(num_probes=1), 0)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with SummaryWriter(str(tmp_path)) as writer:
        write_spectrum(writer, found(num_probes=1), 0)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Tags()["images"] == []


def test_one_probe_has_numbers_and_no_intervals() -> None:
    values = spectrum_scalars(found(num_probes=1))
    assert tags.SPECTRUM_TRACE in values and not set(tags.interval(tags.SPECTRUM_TRACE)) & values.keys()
