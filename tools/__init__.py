"""What the maintainers of the package run: ``python -m tools.NAME``."""
