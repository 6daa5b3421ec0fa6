"""What train.py and validate.py write to the terminal while they work."""

from __future__ import annotations

import logging

from huggingface_hub.utils import logging as hub_logging

__all__ = ["log_to_terminal"]


def log_to_terminal(is_first: bool = True) -> None:
    """Messages of the package as plain lines on stderr, warnings alone from other libraries; of a
    distributed run's processes, only the first says more than warnings."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("timm_structdrop").setLevel(logging.INFO if is_first else logging.WARNING)
    hub_logging.disable_propagation()  # it has a handler of its own
