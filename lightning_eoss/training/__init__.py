"""How a running Trainer is observed without being disturbed."""
