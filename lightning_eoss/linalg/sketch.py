r"""Sparse random projections: lengths and angles of vectors too many or too long to be kept.

References:
    Charikar, Chen and Farach-Colton, "Finding frequent items in data streams", ICALP 2002 (the count sketch);
    Weinberger, Dasgupta, Langford, Smola and Attenberg, "Feature hashing for large scale multitask learning", ICML 2009
    (its variance).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_BLOCK = 2**20  # entries hashed at once: 50 MB of passing memory
_MULTIPLIERS = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)  # those of SplitMix64, as signed numbers


def count_sketch(pieces: Sequence[Sequence[Tensor]], dimension: int, seed: int = 0) -> Tensor:
    r"""Projects a long vector to a short one: each entry, with a random sign, is added to a random bucket.

    .. math:: (S x)_j = \sum_{i:\, h(i) = j} s(i)\, x_i, \qquad E |S x|^2 = |x|^2, \qquad
        \frac{\mathrm{sd}\, |S x|^2}{|x|^2} \le \sqrt{2 / k}

    A length is half as far off, relatively :math:`\sqrt{1 / 2k}`; a cosine by :math:`\sqrt{1 / k}` near 90 degrees. The
    projection is linear, so lengths of differences are had from differences of sketches. Bucket and sign are a hash of
    seed and place, the same on every device, and nothing but the sketch is kept. A vector of no more than k entries is
    only copied, and exact.

    Args:
        pieces: The vector as pieces (layers) of tensors, of any shapes and devices.
        dimension: Length k of the sketch.
        seed: Chooses the projection.

    Returns:
        (number of pieces, k) sketches of the pieces, all others taken for zero, float64; their sum is the sketch of the
        whole vector. On the device of the first tensor, or the CPU where that has no float64.

    Raises:
        ValueError: If the dimension is not positive, or there are no pieces.

    Example:
        >>> x = torch.ones(100_000)
        >>> sketches = count_sketch([[x], [2 * x, x]], 4096)
        >>> [round(float(each) / 100_000) for each in (*sketches.square().sum(1), sketches.sum(0).square().sum())]
        [1, 5, 6]
    """
    if dimension < 1 or not any(pieces):
        raise ValueError(f"dimension={dimension} must be positive, and there must be tensors: nothing would be kept.")
    device = next(tensor.device for piece in pieces for tensor in piece)
    device = torch.device("cpu") if device.type == "mps" else device
    exact = sum(tensor.numel() for piece in pieces for tensor in piece) <= dimension
    sketches = torch.zeros(len(pieces), dimension, dtype=torch.float64, device=device)
    place = 0
    for sketch, piece in zip(sketches, pieces, strict=True):
        for tensor in piece:
            for block in tensor.detach().reshape(-1).split(_BLOCK):
                values = block.to(device, torch.float64)
                index = torch.arange(place, place + len(values), device=device)
                place += len(values)
                if not exact:
                    bits = _hashed(index, seed)
                    values = torch.where(bits < 0, -values, values)
                    index = (bits & 0x7FFFFFFFFFFFFFFF) % dimension
                sketch.index_add_(0, index, values)
    return sketches


def _hashed(index: Tensor, seed: int) -> Tensor:
    """64 random bits for each number (SplitMix64: a finaliser of products and shifts)."""
    bits = (index + 1) * -0x61C8864680B583EB + _signed(seed * 0xBF58476D1CE4E5B9)
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        bits = (bits ^ _shifted(bits, shift)) * multiplier
    return bits ^ _shifted(bits, 31)


def _shifted(bits: Tensor, shift: int) -> Tensor:
    """A shift to the right that fills with zeros; torch's fills with the sign."""
    return (bits >> shift) & ((1 << (64 - shift)) - 1)


def _signed(number: int) -> int:
    """The same 64 bits as a signed number."""
    return (number + 2**63) % 2**64 - 2**63
