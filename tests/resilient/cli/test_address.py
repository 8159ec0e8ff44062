"""URL[@STEP] and store options, as people type them."""

from __future__ import annotations

import pytest

from resilient.cli.address import Address, UsageWrong, parse, parse_options


@pytest.mark.parametrize(
    ("text", "url", "step"),
    [
        ("/data/run", "/data/run", None),
        ("/data/run@12", "/data/run", 12),
        ("/data/run@0012", "/data/run", 12),
        ("/data/run@newest", "/data/run", None),
        ("s3://bucket/x@12", "s3://bucket/x", 12),
        ("s3://bucket@12", "s3://bucket", 12),
        ("memory://name@3", "memory://name", 3),
        ("/home/me@host/run", "/home/me@host/run", None),
        ("/home/me@host/run@7", "/home/me@host/run", 7),
        ("/data/run@12@newest", "/data/run@12", None),
        ("/data/run@12@7", "/data/run@12", 7),
        ("sftp://me@10.0.0.5/run", "sftp://me@10.0.0.5/run", None),
        ("/data/run@latest", "/data/run@latest", None),
        ("/data/run@-1", "/data/run@-1", None),
        ("/data/run@1.5", "/data/run@1.5", None),
        ("/data/run@", "/data/run@", None),
        ("@12", "@12", None),
        ("/data/run@12/", "/data/run@12/", None),
        ("/data/run@" + "9" * 30, "/data/run@" + "9" * 30, None),
        ("/da\nta/run@5", "/da\nta/run", 5),
        ("/data/run@１２", "/data/run@１２", None),
    ],
)
def test_a_step_is_digits_after_the_last_at(text, url, step):
    assert parse(text) == Address(url=url, step=step)


def test_store_options_are_text_unless_they_are_json():
    options = parse_options(["key=0123", "secret=a=b", "anon:=true", 'client_kwargs:={"verify":false}', "empty="])
    assert options == {"key": "0123", "secret": "a=b", "anon": True, "client_kwargs": {"verify": False}, "empty": ""}


@pytest.mark.parametrize("item", ["hunter2", "=hunter2", ":=hunter2", "secret:=hunter2"])
def test_a_wrong_store_option_is_refused_without_showing_it(item):
    with pytest.raises(UsageWrong) as caught:
        parse_options([item])
    assert "hunter2" not in str(caught.value)
