"""Published alternatives, with fixes only where they would fail."""
