#!/usr/bin/env python3
"""``timm-structdrop validate`` from a clone: evaluate a model, or how robust it is.

python validate.py --recipe digits-quickstart --checkpoint output/train/<run>
python validate.py ... --corruptions paper --severities 1-5 --plot curves.png
"""

from timm_structdrop.cli.validate import main
from timm_structdrop.errors import run_command

if __name__ == "__main__":
    run_command(main)
