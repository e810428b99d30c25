"""Distillers learn pixels and text vectors. New: one file, one line in catalog.DISTILLERS."""
