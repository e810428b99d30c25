"""Log events and progress bars. A new event also has a row in docs/watching.md."""
