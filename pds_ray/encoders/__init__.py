"""Encoders of images and captions. A new one: one file here and one line in catalog.py."""
