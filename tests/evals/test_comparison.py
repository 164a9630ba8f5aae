"""The comparison page: everything in one file, and what a browser makes of it."""

import base64
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lidit.errors import InputError
from lidit.evals.comparison import RunPage, write_report
from pipelines.evaluation import compare

PROMPT = 'a <b>red</b> circle & a "blue" square'


def picture(level: int) -> np.ndarray:
    return np.full((32, 32, 3), level, np.uint8)


@pytest.fixture
def page(tmp_path: Path) -> Path:
    runs = [
        RunPage(
            name,
            {"train.steps": "100", "model.width": str(width)},
            {"overall/lax": score, "only/here": 0.5} if width == 96 else {"overall/lax": score},
            {"loss": [(10, 1.0), (20, score)]},
            {PROMPT: [picture(width), picture(width + 1)]},
        )
        for name, width, score in (("small", 96, 0.25), ("large", 128, 0.75))
    ]
    write_report(tmp_path / "report.html", runs, (0, 1))
    return tmp_path / "report.html"


class Reader(HTMLParser):
    """Tags with their attributes, and the text of every cell."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("td", "th"):
            self.inside = True
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.cells[-1] += data


def test_the_page_needs_nothing_but_itself(page: Path) -> None:
    reader = Reader(page.read_text())
    assert not {"script", "link", "iframe"} & {tag for tag, _ in reader.tags}
    sources = [attributes["src"] for tag, attributes in reader.tags if tag == "img"]
    assert len(sources) == 2 * 2 + 1  # two runs, two seeds, one curve
    for source in sources:
        assert source
        Image.open(
            io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,")))
        ).load()
    assert not re.search(r"https?://|url\(", page.read_text())


def test_what_a_reader_compares(page: Path) -> None:
    text = page.read_text()
    cells = Reader(text).cells
    assert PROMPT in cells  # and not as markup
    assert cells[cells.index("overall/lax") + 1 :][:2] == ["0.250", "0.750"]
    assert cells[cells.index("only/here") + 1 :][:2] == ["0.500", ""]
    assert re.search(r'class="number best">0\.750', text)
    assert not re.search(r'class="number best">0\.500', text)
    assert '<tr class="differs"><td>model.width' in text
    assert "<tr><td>train.steps" in text
    assert "seeds 0, 1" in text


def scores_page(folder: Path, *runs: RunPage) -> str:
    write_report(folder / "r.html", runs, (0,))
    return (folder / "r.html").read_text()


def test_only_what_was_measured_alike_has_a_best(tmp_path: Path) -> None:
    scores = ({"overall/lax": 0.2, "gain": 0.9}, {"overall/lax": 0.8, "gain": 0.1})
    alike, other = (
        {"overall/lax": "24 prompts", "gain": "x"},
        {"overall/lax": "2 prompts", "gain": "x"},
    )
    text = scores_page(
        tmp_path,
        RunPage("a", scores=scores[0], measured=alike),
        RunPage("b", scores=scores[1], measured=other),
    )
    assert re.findall(r'best">([^<]+)<', text) == ["0.900"]
    assert "<td>overall/lax *</td>" in text
    assert "<td>gain</td>" in text
    assert "* Measured with different settings" in text
    text = scores_page(
        tmp_path, *(RunPage(name, scores=one, measured=alike) for name, one in zip("ab", scores))
    )
    assert re.findall(r'best">([^<]+)<', text) == ["0.800", "0.900"]
    assert "Measured with different settings" not in text


def test_what_chance_may_have_put_on_top_has_no_best(tmp_path: Path) -> None:
    def bests(first: tuple[float, float, float], second: tuple[float, float, float]) -> list[str]:
        named = [dict(zip(("lax", "lax_low", "lax_high"), one)) for one in (first, second)]
        text = scores_page(tmp_path, *(RunPage(name, scores=one) for name, one in zip("ab", named)))
        return re.findall(r'best">([^<]+)<', text)

    assert bests((0.5, 0.4, 0.6), (0.7, 0.55, 0.8)) == []
    assert bests((0.5, 0.4, 0.6), (0.7, 0.61, 0.8)) == ["0.700 [0.610, 0.800]"]


def test_high_is_not_good_in_every_number(tmp_path: Path) -> None:
    for name in ("overall/floor_lax", "list4/drop", "held_out_pair/lax_gap"):
        assert 'best">' not in scores_page(
            tmp_path, RunPage("a", scores={name: 0.1}), RunPage("b", scores={name: 0.4})
        )


def test_intervals_stand_beside_their_value(tmp_path: Path) -> None:
    scores = {"drop": 0.25, "drop_low": 0.1, "drop_high": 0.4, "flow": 0.5}
    cells = Reader(
        scores_page(tmp_path, RunPage("a", scores=scores), RunPage("b", scores={"drop": 0.5}))
    ).cells
    assert cells[cells.index("drop") + 1 :][:2] == ["0.250 [0.100, 0.400]", "0.500"]
    assert "flow" in cells
    assert not {"drop_low", "drop_high"} & set(cells)


def test_what_must_be_known_of_scores_is_said_even_without_any(tmp_path: Path) -> None:
    text = scores_page(tmp_path, RunPage("a", notes=("a: its scores are <old>",)), RunPage("b"))
    assert "<p>a: its scores are &lt;old&gt;</p>" in text
    assert "<table>" not in text


def test_one_run_is_no_comparison(tmp_path: Path) -> None:
    for runs in ([RunPage("a")], [RunPage("a"), RunPage("a")], []):
        with pytest.raises(InputError, match="two or more runs"):
            write_report(tmp_path / "r.html", runs, (0,))


def test_one_run_is_refused_before_it_draws_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run" / "model").mkdir(parents=True)
    monkeypatch.setattr(compare, "load_pipeline", lambda _: pytest.fail("a model was loaded"))
    for folders in ([tmp_path / "run"], [tmp_path / "run", tmp_path / "run"]):
        with pytest.raises(InputError, match="two or more runs of different names"):
            compare.compare_runs(folders, ["a red circle"], (0,), tmp_path / "r.html")


@pytest.mark.slow
def test_a_browser_shows_every_picture(page: Path, tmp_path: Path) -> None:
    browser = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if browser is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    told = (
        "<script>onload = () => { document.title = JSON.stringify({"
        "widths: [...document.images].map(image => image.naturalWidth),"
        "rows: document.querySelectorAll('tbody tr').length,"
        "wide: document.documentElement.scrollWidth > innerWidth}) }</script></body>"
    )
    (tmp_path / "told.html").write_text(page.read_text().replace("</body>", told))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,1000",
               "--virtual-time-budget=5000", "--dump-dom",
               f"file://{tmp_path}/told.html"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    match = re.search(r"<title>(.*?)</title>", done.stdout)
    assert match
    seen = json.loads(match[1].replace("&quot;", '"'))
    assert len(seen["widths"]) == 5
    assert min(seen["widths"]) >= 32
    assert seen["rows"] == 1 + 2 + 2
    assert not seen["wide"]
