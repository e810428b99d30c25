"""What others do, as published, with its accidents mended where they would only make it fail."""
