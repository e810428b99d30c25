"""Images with their captions in files beside them: `7.jpg`, `7.txt`, `7.json`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from pds_ray.sources.base import Fault, Sample
from pds_ray.sources.local_files import LocalFiles, spellings, storable
from pds_ray.sources.samples import Files


@dataclass(frozen=True)
class Beside:
    """The images below a folder, by the suffixes of `known`."""

    files: LocalFiles
    known: Files
    each_line: bool
    """Each line of a text file is a caption."""

    def images(self, names: set[str]) -> Iterator[tuple[str, list[str]]]:
        """Yield the images among the files of a folder, in order, each with its caption files."""
        for name in sorted(names):
            suffix = self.known.suffix(name)
            if suffix in self.known.images:
                stem = name.removesuffix(name[-len(suffix) :])
                beside = (self._captions(spelled, names) for spelled in spellings(stem))
                yield name, next(filter(None, beside), [])

    def _captions(self, stem: str, names: set[str]) -> list[str]:
        """Return the caption files of a stem, with its dot, among the files of a folder."""
        files = (
            stem + spelling
            for caption in self.known.captions.suffixes
            for spelling in (caption, caption.upper())
        )
        return [file for file in files if file in names]

    def read(self, folder: str, first: str, last: str) -> Iterator[Sample | Fault]:
        """Yield the samples and faults of the images of a folder from `first` to `last`.

        Raises SourceError if the folder has gone.
        """
        # files of a sample are alike up to the first dot, so that these bounds hold them all, but
        # for those with accents, which may be spelled otherwise
        low, high = first.partition(".")[0], last.partition(".")[0] + "\U0010ffff"
        names = self.files.names(folder, lambda name: low <= name <= high or not name.isascii())
        for image, beside in self.images(names):
            if first <= image <= last:
                yield self._sample(folder, image, beside)

    def _sample(self, folder: str, image: str, beside: list[str]) -> Sample | Fault:
        key = storable(os.path.join(folder, image))
        data = self.files.read(os.path.join(folder, image), key, self.known.max_image_bytes)
        if isinstance(data, Fault):
            return data
        texts: dict[str, bytes] = {}
        for name in beside:
            text = self.files.read(os.path.join(folder, name), key, self.known.max_text_bytes)
            if isinstance(text, Fault):
                return text
            texts[self.known.suffix(name)] = text
        reader = self.known.captions
        captions = reader.read(texts, self.each_line)
        if captions.texts:
            return Sample(key, data, captions.texts, captions.notes)
        nothing = f"no caption file ({', '.join(reader.suffixes)})"
        return Fault(key, "missing_caption", reader.found(texts) if texts else nothing)
