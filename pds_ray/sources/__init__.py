"""Sources of samples. A new one: one file here and one line in catalog.SOURCES."""
