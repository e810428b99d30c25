"""Messages to users hold no secrets."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pds_ray.errors import UserError, first_line, without_secrets
from pds_ray.sources.base import SourceError
from pds_ray.store.storage import StorageError


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/a/b@c?d", "/a/b@c?d"),
        ("", ""),
        ("scenes:10", "scenes:10"),
        ("s3://bucket/a@b/*.tar", "s3://bucket/a@b/*.tar"),
        ("s3://KEY:SECRET@bucket/x", "s3://bucket/x"),
        ("s3://KEY:SEC/RET+1@bucket/x", "s3://bucket/x"),  # not encoded, as the user pasted it
        ("s3://KEY@bucket/x", "s3://bucket/x"),
        # the rest of a secret that was split at its slash
        ("cannot open s3://KEY:SEC?region=eu", "cannot open s3://?region=eu"),
        ("no 'hdfs://host:8020'", "no 'hdfs://host:8020'"),
        (
            "s3://b/x?region=eu&scheme=http&endpoint_override=h:9",
            "s3://b/x?region=eu&scheme=http&endpoint_override=h:9",
        ),
        ("s3://bucket/x?secret_key=S&region=eu&token=T", "s3://bucket/x?region=eu"),
        ("gs://bucket/x?token=T", "gs://bucket/x"),
        ("hdfs://host:8020/x", "hdfs://host:8020/x"),
        ("s3://K:S@a/x.tar?token=T::s3://K:S@b/y.tar", "s3://a/x.tar::s3://b/y.tar"),
        ("abfs://box@acc.dfs.core.windows.net/x", "abfs://box@acc.dfs.core.windows.net/x"),
        ("abfs://K:S@acc.dfs.core.windows.net/x", "abfs://acc.dfs.core.windows.net/x"),
        ("oci://bucket@space/x?token=T", "oci://bucket@space/x"),
        ("https://u:p@h/x.tar?X-Amz-Signature=S", "https://h/x.tar"),
        ("no s3://K:S@a/x: gone; is it there?", "no s3://a/x: gone; is it there?"),
        ("http://[::1]:80/0.tar?sig=x", "http://[::1]:80/0.tar"),
        ("http://me:secret@[::1]:80/0.tar", "http://[::1]:80/0.tar"),
        ("s3://[ab:cd]ef/gh/0.tar", "s3:///gh/0.tar"),
    ],
)  # fmt: skip
def test_uris_are_shown_without_secrets(text: str, shown: str) -> None:
    assert without_secrets(text) == shown
    for kind in (UserError, SourceError, StorageError):
        error = kind(text)
        assert str(error) == shown
        assert str(pickle.loads(pickle.dumps(error))) == shown  # noqa: S301 - as Ray sends it
    assert first_line(OSError(f"({text})\nmore")).startswith(f"({shown}")


PARTS = st.text("abcXYZ019+/%:-_.=~", max_size=12).filter(lambda text: "://" not in text)


@given(
    before=PARTS, after=PARTS, name=st.sampled_from(["token", "secret_key", "account_key", "sas"])
)
def test_no_login_and_no_secret_setting_is_shown(before: str, after: str, name: str) -> None:
    secret = f"{before}S3CR3T{after}"
    for uri in (
        f"s3://AKID:{secret}@bucket/x",
        f"gs://bucket/x?region=r&{name}={secret}&scheme=http",
    ):
        shown = without_secrets(f"no shard matches {uri} (looked in {uri})")
        assert "S3CR3T" not in shown
        assert "AKID" not in shown
        assert "bucket/x" in shown
