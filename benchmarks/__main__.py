"""All speed benchmarks in one run: see ``python -m benchmarks --help``."""

from benchmarks._suite import main
from timm_structdrop.errors import run_command

run_command(main)
