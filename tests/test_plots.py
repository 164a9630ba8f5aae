"""The frame of every figure: PNGs without a program's name, in folders that are made."""

from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from lidit.evals.statistics import Interval
from lidit.plots import new_figure, plot_intervals, plot_lines, save_figure


def pixels_of(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(content)).convert("L"), dtype=int)


def lines(**series: list[float]) -> bytes:
    buffer = BytesIO()
    plot_lines(
        buffer,
        {name: (range(len(values)), values) for name, values in series.items()},
        "loss",
        "title",
    )
    return buffer.getvalue()


def test_a_figure_is_written_as_png_of_its_size(tmp_path: Path) -> None:
    path = tmp_path / "made" / "figure.png"
    save_figure(new_figure((3, 2), dpi=50), path)
    with Image.open(path) as image:
        assert (image.format, image.size) == ("PNG", (150, 100))
        assert "Software" not in image.info or image.info["Software"] == ""


def test_lines_are_those_of_the_values() -> None:
    assert np.abs(pixels_of(lines(a=[1, 2, 3])) - pixels_of(lines(a=[1, 2, 3]))).max() == 0
    assert (pixels_of(lines(a=[1, 2, 3])) != pixels_of(lines(a=[3, 2, 1]))).mean() > 0.001


def test_only_positive_values_have_a_logarithmic_axis() -> None:
    """A value of zero or below would be missing from such an axis."""
    straight, curved = pixels_of(lines(a=[0, 50, 100])), pixels_of(lines(a=[1, 50, 100]))
    assert (straight != curved).mean() > 0.001
    assert pixels_of(lines(a=[])).shape == straight.shape


def test_intervals_are_those_of_the_positions(tmp_path: Path) -> None:
    narrow, wide = [Interval(0.5, 0.45, 0.55)] * 4, [Interval(0.5, 0.1, 0.9)] * 4
    for name, intervals in (("narrow", narrow), ("wide", wide)):
        plot_intervals(tmp_path / f"{name}.png", {"model": intervals}, "score", "title")
    dark = [
        (pixels_of((tmp_path / f"{name}.png").read_bytes()) < 200).sum()
        for name in ("narrow", "wide")
    ]
    assert dark[1] > dark[0]
