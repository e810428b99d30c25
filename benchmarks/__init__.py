"""Measurements side by side with what a user would pick instead: `python -m benchmarks --help`, or `make bench`.

A row of the table is a module of `rows`: what is compared, on what data, and what is to be reached. `baselines` holds
what others do, written for this purpose from the published procedure. Nothing here is part of the package.
"""
