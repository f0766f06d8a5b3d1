"""Measurements, one command each: `python -m benchmarks.NAME --help`. Not part of the tests.

`python -m benchmarks --out FOLDER` runs those of what a round costs, one after the other.
"""
