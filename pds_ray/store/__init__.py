"""The files that runs leave: names, columns, atomic writes. A new stage names its files here."""
