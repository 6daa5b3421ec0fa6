"""What the regularizers do on few real digits: the protocol, its runs and its tables.

    python -m benchmarks.digits_study tune | main | ablations | report

`cells.py` has what is compared, `protocol.py` one run, `report.py` the tables and the pictures.
The results are in `benchmarks/results/digits-study*`; each command does what is missing there.
"""
