"""Refusals as rows: whatever their texts hold, the table can be written and read."""

from lidit.store import Refusal
from lidit.store.samples import quarantine_table


def test_texts_of_any_bytes_become_rows() -> None:
    row = quarantine_table(
        [Refusal("caf\udce9", "f\udcfcr.txt", "bad \udce9 and \0, 猫", "sample")]
    ).to_pylist()[0]
    assert row == {
        "key": "caf\\udce9",
        "file": "f\\udcfcr.txt",
        "reason": "bad \\udce9 and \\0, 猫",
        "what": "sample",
    }
