"""From bytes to what a model takes, one file per modality: images, captions."""
