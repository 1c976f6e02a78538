"""Live sharpness monitoring: where a training run stands against the edge of stability, with error bars."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lightning_eoss.callbacks.gradient_noise import GradientNoiseMonitor as GradientNoiseMonitor
    from lightning_eoss.callbacks.injector import GradientNoiseInjector as GradientNoiseInjector
    from lightning_eoss.callbacks.rescaler import LearningRateRescaler as LearningRateRescaler
    from lightning_eoss.callbacks.sharpness import SharpnessMonitor as SharpnessMonitor
    from lightning_eoss.callbacks.spectral_learning_rate import SpectralLearningRate as SpectralLearningRate
    from lightning_eoss.callbacks.spectrum import SpectralDensityMonitor as SpectralDensityMonitor
    from lightning_eoss.callbacks.weights import WeightDistanceMonitor as WeightDistanceMonitor
    from lightning_eoss.curvature.measure import Eigenvalue as Eigenvalue
    from lightning_eoss.curvature.measure import SharpnessMeasurement as SharpnessMeasurement
    from lightning_eoss.curvature.measure import measure_sharpness as measure_sharpness
    from lightning_eoss.curvature.potential import RandomPotential as RandomPotential
    from lightning_eoss.curvature.potential import random_potential as random_potential
    from lightning_eoss.curvature.predict import SharpnessPrediction as SharpnessPrediction
    from lightning_eoss.curvature.predict import predict_sharpness as predict_sharpness
    from lightning_eoss.curvature.spectrum import Spectra as Spectra
    from lightning_eoss.curvature.spectrum import measure_spectra as measure_spectra
    from lightning_eoss.metrics import MiniBatchSharpness as MiniBatchSharpness
    from lightning_eoss.theory.statistics import Estimate as Estimate

# Imported on first use, so that the parts that know no Lightning do not import it.
_HOME = {
    "Eigenvalue": "curvature.measure",
    "Estimate": "theory.statistics",
    "GradientNoiseInjector": "callbacks.injector",
    "GradientNoiseMonitor": "callbacks.gradient_noise",
    "LearningRateRescaler": "callbacks.rescaler",
    "MiniBatchSharpness": "metrics",
    "RandomPotential": "curvature.potential",
    "SharpnessMeasurement": "curvature.measure",
    "SharpnessMonitor": "callbacks.sharpness",
    "SharpnessPrediction": "curvature.predict",
    "Spectra": "curvature.spectrum",
    "SpectralDensityMonitor": "callbacks.spectrum",
    "SpectralLearningRate": "callbacks.spectral_learning_rate",
    "WeightDistanceMonitor": "callbacks.weights",
    "measure_sharpness": "curvature.measure",
    "measure_spectra": "curvature.spectrum",
    "predict_sharpness": "curvature.predict",
    "random_potential": "curvature.potential",
}
__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    """Finds a public name in its module."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
