"""Random numbers that nothing else draws."""

import numpy as np


# ---- which samples ---------------------------------------------------------------------------------------------------
def derived_seed(seed: int, *keys: int) -> int:
    """A seed for each combination of keys, independent of all global state (numpy's SeedSequence).

    Example:
        >>> derived_seed(0, 1) != derived_seed(0, 2)
        True
    """
    return int(np.random.SeedSequence([seed, len(keys), *keys]).generate_state(1)[0])
