"""The tour runs from its first cell to its picture, and its outputs in the repository are of a
whole run.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.notebook import run_notebook

TOUR = Path(__file__).parents[2] / "examples" / "notebooks" / "tour.ipynb"


@pytest.mark.slow
def test_the_tour_runs_and_its_model_has_learned() -> None:
    notebook = json.loads(TOUR.read_text(encoding="utf-8"))
    made = run_notebook(notebook)
    assert made["report"].sound
    printed = "".join(
        "".join(output.get("text", ()))
        for cell in notebook["cells"]
        for output in cell.get("outputs", ())
    )
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", printed)]
    assert losses[-1] < 0.5 * losses[0]
    images = np.stack([np.asarray(image) for image in made["images"]])
    assert images.shape == (4, 16, 16, 3)
    # The captions name a side: the half where the square belongs is the one that is not background.
    for image, caption in zip(images.astype(int), made["CAPTIONS"], strict=True):
        unlike = np.abs(image - 245).sum(-1)
        left, right = unlike[:, :8].sum(), unlike[:, 8:].sum()
        assert (left > right) == caption.endswith("left"), caption


def test_what_is_committed_is_a_whole_run() -> None:
    cells = [
        cell
        for cell in json.loads(TOUR.read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == "code"
    ]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert "image/png" in cells[-1]["outputs"][-1]["data"]
    assert "/tmp" not in json.dumps(cells)
