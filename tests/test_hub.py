"""The model hub: what counts as an id there, and what a user reads when it gives nothing."""

from collections.abc import Callable

import pytest

from lidit.codecs import load_codec
from lidit.config import CodecSettings, EncoderSettings
from lidit.errors import InputError
from lidit.hub import is_hub_id
from lidit.pipeline import LIDiTPipeline
from lidit.text import resolve_encoder

COMMIT = "0123456789" * 4


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("owner/model", True),
        ("model", False),
        ("./model", False),
        ("/model", False),
        ("~/model", False),
        ("../model", False),
        ("some/folder/model", False),
    ],
)
def test_what_counts_as_an_id(name: str, expected: bool) -> None:
    assert is_hub_id(name) is expected


@pytest.mark.parametrize(
    "ask",
    [
        lambda: resolve_encoder(
            EncoderSettings(name="x", model="nobody/model", revision=COMMIT), "cpu"
        ),
        lambda: load_codec(CodecSettings(name="x", model="nobody/model", revision=COMMIT)),
        lambda: LIDiTPipeline.from_pretrained("nobody/model", revision=COMMIT),
    ],
    ids=["encoder", "codec", "pipeline"],
)
def test_without_a_connection_every_user_of_the_hub_says_the_same(
    ask: Callable[[], object],
) -> None:
    with pytest.raises(InputError) as told:
        ask()
    message = str(told.value)
    assert message.startswith("nobody/model at 012345678901: cannot be fetched from the hub (")
    assert message.endswith("; check the id, the revision and the connection, or give a folder")
    assert "\n" not in message


def test_an_encoder_and_a_codec_of_the_hub_must_be_pinned() -> None:
    with pytest.raises(InputError, match="pinned hub id: set `revision:`"):
        resolve_encoder(EncoderSettings(name="x", model="nobody/model"), "cpu")
    with pytest.raises(InputError, match=r"pinned hub id: set codec\.revision"):
        load_codec(CodecSettings(name="x", model="nobody/model"))
