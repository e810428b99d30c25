"""Measurements beside a user's alternatives: `python -m benchmarks --help` or `make bench`.

A row of the table is a module of `rows`: two sides, their data and the target. `baselines` holds
the alternatives, written for this purpose from the published procedure. Nothing here is part of
the package.
"""
