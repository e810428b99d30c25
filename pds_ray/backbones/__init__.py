"""Backbones of evaluations. A new one: one file here and one line in catalog.BACKBONES."""
