"""All rows, by theme."""

from tests.setups.callbacks import CALLBACKS
from tests.setups.case import Case
from tests.setups.loaders import LOADERS
from tests.setups.models import MODELS
from tests.setups.precision import PRECISIONS
from tests.setups.trainers import TRAINERS

TABLE: dict[str, list[Case]] = {
    "Models": MODELS,
    "Precision": PRECISIONS,
    "Data": LOADERS,
    "Trainers and loops": TRAINERS,
    "Other callbacks and loggers": CALLBACKS,
}
