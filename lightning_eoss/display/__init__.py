"""Tags, the TensorBoard page, figures and tables; sees results only."""
