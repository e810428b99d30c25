"""Decoders of prototypes. A new one: one file here and one line in catalog.DECODERS."""
