"""Computation of each stage, without Ray. A new one: a file here and in distributed/, and a row."""
