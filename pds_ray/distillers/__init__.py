"""Distillers: they learn pixels and text vectors. A new one: one file, one line in catalog.DISTILLERS."""
