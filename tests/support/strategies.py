"""Hypothesis strategies for bytes and texts of strangers, built on the corpus in `hostile`."""

from __future__ import annotations

import gzip
import json
import tarfile

from hypothesis import strategies as st

from tests.support.hostile import (
    CAPTIONS,
    END_MARK,
    JSON,
    SHARDS,
    block,
    header,
    long_name,
    pax,
    tar_bytes,
)

KINDS = [*tarfile.SUPPORTED_TYPES, *(bytes([n]) for n in b"DMNVXZg~\0")]
NAMES = st.sampled_from(
    ["a", "b", "c/d", "../e", "/f", "g\n", "__MACOSX/h", ".i", "é", "j/", "././@Long", "n" * 120]
)
SUFFIXES = st.sampled_from(["", ".jpg", ".PNG", ".txt", ".json", ".cls", ".seg.png"])
BODIES = st.binary(max_size=600) | st.sampled_from(
    [b"", b"12 path=q.j\n", b"\xff\xfe", *(text for text in JSON.values() if len(text) < 1000)]
)
SIZES = st.sampled_from([0, 1, 511, 512, 513, 1 << 33, -1, -(2**40)]) | st.integers(0, 600)


@st.composite
def members(draw: st.DrawFn) -> bytes:
    """A member of any kind, honest about its size or not."""
    name = draw(NAMES) + draw(SUFFIXES)
    data = draw(BODIES)
    size = draw(st.just(len(data)) | SIZES)
    kind = draw(st.just(tarfile.REGTYPE) | st.sampled_from(KINDS))
    longer = st.sampled_from([long_name(name.encode() * 3), pax((b"path", name.encode()))])
    return draw(st.just(b"") | longer) + header(name[:90], size, kind, "target") + block(data)


@st.composite
def good_tars(draw: st.DrawFn) -> bytes:
    """A tar of whole samples up to its end mark, members in any order, names short and long."""
    folder = draw(st.sampled_from(["", "é.v1/", f"{'d' * 90}/{'e' * 90}/"]))
    members = []
    for name in draw(st.lists(st.text("abc0é", min_size=1, max_size=8), unique=True, max_size=5)):
        key = folder + name
        suffix = draw(st.sampled_from(["jpg", "PNG", "webp"]))
        image = (f"{key}.{suffix}", draw(st.binary(max_size=1500)))
        record = (f"{key}.json", json.dumps({"caption": f"json of {name}"}).encode())
        others = draw(st.lists(st.sampled_from([record, (f"{key}.cls", b"7")]), unique=True))
        members += draw(st.permutations([image, (f"{key}.txt", name.encode()), *others]))
    return tar_bytes(members, draw(st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])))


any_tar = good_tars() | st.lists(
    members() | st.binary(max_size=700) | st.sampled_from(list(SHARDS.values())[:10]), max_size=12
).map(lambda parts: b"".join(parts) + END_MARK)
"""Something like a tar, good or bad."""


@st.composite
def mangled(draw: st.DrawFn, whole: st.SearchStrategy[bytes], start: int = 0) -> bytes:
    """Bytes of `whole` with some of them overwritten behind the first `start`, and cut or not."""
    data = bytearray(draw(whole))
    edits = st.tuples(st.integers(start, max(start, len(data) - 1)), st.binary(max_size=4))
    for place, patch in draw(st.lists(edits, max_size=5)):
        data[place : place + len(patch)] = patch
    return bytes(data[: draw(st.none() | st.integers(start, len(data)))])


packings = st.sampled_from([bytes, gzip.compress])

texts = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(CAPTIONS)
"""Captions that can be stored."""

any_text = (
    texts
    | st.text(st.characters())
    | st.text("ab \n\t\u200b\u202e\x00", min_size=1990, max_size=2020)
    | st.builds(str.__mul__, st.text(), st.integers(1, 500))
)
"""Captions of any length, lone surrogates included."""

_FIELDS = st.sampled_from(["caption", "captions", "x"])
any_json = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_FIELDS, inner, max_size=3),
    max_leaves=20,
)
"""Values that a .json may hold."""
