"""Methods, each a list of stages. A new one: one file here and one line in catalog.METHODS."""
