"""Runs of any method, from start to finish. A new stage or method needs nothing here."""
