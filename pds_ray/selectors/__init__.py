"""Selectors of real pairs. A new one: one file here and one line in catalog.SELECTORS."""
