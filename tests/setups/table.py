"""All rows, by theme."""

from tests.setups.case import Case
from tests.setups.loaders import LOADERS
from tests.setups.models import MODELS
from tests.setups.precision import PRECISIONS

TABLE: dict[str, list[Case]] = {"Models": MODELS, "Precisions": PRECISIONS, "Data": LOADERS}
