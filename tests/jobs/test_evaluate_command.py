"""`lidit evaluate` by measure, and in the form without a measure's name: the same checks, the same
settings.
"""

from pathlib import Path

import pytest

from tests.helpers.command import lidit


@pytest.mark.parametrize(
    ("named", "unnamed", "told"),
    [
        (
            ("scenes", "m", "pictures=4"),
            ("m", "pictures=4"),
            "pictures=4: not used by this measure; it takes batch",
        ),
        (
            ("binding", "m", "per_tag=4"),
            ("m", "--binding", "per_tag=4"),
            "per_tag=4: not used by this measure",
        ),
        (
            ("suite", "geneval", "m"),
            ("m", "--suite", "geneval"),
            "geneval: give --prompts FILE to draw, or --parse",
        ),
        (
            ("pictures", "m", "x", "seed=1"),
            ("m", "--pictures", "x", "seed=1"),
            "seed=1: not used by this measure",
        ),
        (("scenes", "m"), ("m",), "m: no model_index.json"),
        (("binding", "m"), ("m", "--binding"), "m: no model_index.json"),
    ],
)
def test_both_forms_say_the_same(
    named: tuple[str, ...],
    unnamed: tuple[str, ...],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("m").mkdir()
    for words in (named, unnamed):
        assert lidit("evaluate", *words) == 2
        assert told in capsys.readouterr().err, words


def test_the_help_lists_measures_and_each_explains_itself(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert lidit("evaluate", "--help") == 0
    text = capsys.readouterr().out
    assert all(f"│ {name} " in text for name in ("scenes", "binding", "suite", "pictures"))
    assert "│ model " not in text  # today's form stays without being offered
    for name in ("scenes", "binding", "suite", "pictures"):
        assert lidit("evaluate", name, "--help") == 0
        text = capsys.readouterr().out
        assert "Writes" in text
        assert f"lidit evaluate {name}" in text


def test_options_of_another_measure_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert lidit("evaluate", "m", "--workers", "2") == 2
    assert "--workers belongs to --suite" in capsys.readouterr().err
    assert lidit("evaluate", "binding", "m", "--workers", "2") == 2
    assert "No such option: --workers" in capsys.readouterr().err
    assert lidit("evaluate", "pictures", "m", "pictures=4") == 2
    assert "give a folder or file of pictures" in capsys.readouterr().err
