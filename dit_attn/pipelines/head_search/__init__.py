"""Search for attention heads whose perturbation raises an objective."""
