"""Random numbers that nothing else draws."""

from enum import IntEnum, unique

import numpy as np


@unique
class Use(IntEnum):
    """What random numbers are drawn for: each use has its own seed."""

    FULL_BATCH = 0  # the fixed random subset that the full batch is
    CHUNKS = 1  # inside the network and the data set, for each chunk of the full batch
    SHARPNESS = 2  # starts of the solver
    MINI_BATCHES = 3  # of MiniBS
    SAMPLER_ISOLATION = 4  # generators that a sampler may draw from
    SAMPLER_BATCHES = 5  # MiniBS's, from a copy of training's sampler
    HESSIAN_VARIANCE = 6  # batches, anew for each probe
    SUBSPACE = 7  # the groups of samples
    PREDICTION = 8  # starts and probes
    SPECTRUM = 9  # probes
    SPECTRUM_BATCH = 10  # the one whose spectrum is measured
    RATES_ISOLATION = 11  # of `SpectralLearningRate`: generators that a sampler may draw from
    RATES_BATCH = 12  # its batch
    RATES = 13  # its probe
    NOISE_BATCHES = 14  # whose gradients' variance is measured
    NOISE = 15  # starts of the solver
    POTENTIAL = 16  # directions
    INJECTED_CHUNKS = 17  # inside the network and the data set, for each chunk at each step
    INJECTED_NOISE = 18  # what is added to the gradient


def derived_seed(seed: int, *keys: int) -> int:
    """A seed for each combination of keys, independent of all global state (numpy's SeedSequence).

    Example:
        >>> derived_seed(0, 1) != derived_seed(0, 2)
        True
    """
    return int(np.random.SeedSequence([seed, len(keys), *keys]).generate_state(1)[0])
