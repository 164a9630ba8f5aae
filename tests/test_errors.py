"""What a user reads of an error."""

from lidit.errors import one_line


def test_an_errors_text_is_one_line_and_no_longer_than_asked() -> None:
    error = ValueError("first line\n   second\tword  ")
    assert one_line(error) == "first line second word"
    assert one_line(error, 7) == "first l"
    assert one_line("a\n\nmessage") == "a message"
