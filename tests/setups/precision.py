"""Precisions of the Trainer."""

import torch

from tests.runs import loader, samples
from tests.setups.case import Case


def noise(dtype: torch.dtype) -> float:
    """Twelve roundings of half an eps, one after the other: two layers, forth, back and back again, and the loss."""
    return 12 * float(torch.finfo(dtype).eps) / 2


AUTOCAST = "autocast is off while it measures, so the numbers are those of the float32 weights"

PRECISIONS = [
    Case('`precision="32-true"`', options={"precision": "32-true"}),
    Case(
        '`precision="64-true"`',
        options={"precision": "64-true"},
        data=lambda: loader(samples(12)),
    ),
    Case('`precision="bf16-mixed"`', options={"precision": "bf16-mixed"}, note=AUTOCAST),
    Case(
        '`precision="bf16-mixed"`, measured `precision="as_trained"`',
        options={"precision": "bf16-mixed"},
        monitor=lambda: {"precision": "as_trained"},
        current=noise(torch.bfloat16),
        full=noise(torch.bfloat16),
    ),
    Case(
        '`precision="16-mixed"`',
        options={"precision": "16-mixed"},
        warns=("You passed `Trainer.accelerator='cpu', precision='16-mixed'.`",),
        note=AUTOCAST + "; on a CPU Lightning takes bf16-mixed instead",
    ),
    Case(
        '`precision="bf16-true"`',
        options={"precision": "bf16-true"},
        current=noise(torch.bfloat16),
        full=noise(torch.bfloat16),
    ),
    Case(
        '`precision="16-true"`',
        options={"precision": "16-true"},
        current=noise(torch.float16),
        full=noise(torch.float16),
    ),
]
