"""Probes find what is there and nothing else: on made-up states whose content is known, and on tiny
real LLMs.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from lidit.config import EncoderSettings
from lidit.datasets.scenes.shapes import vocabulary_for
from lidit.errors import InputError
from lidit.evals.probes.probe import (
    QUESTIONS,
    linear_probe,
    probe_captions,
    probe_encoder,
    settings_grid,
)
from lidit.text import PromptEncoder, resolve_encoder
from lidit.text.every_layer import every_layer, prefix_layers
from pipelines import tracking
from tests.helpers.command import lidit
from tests.helpers.tiny_models import tiny_llm

RELEASED = Path(__file__).parents[2] / "fixtures" / "first_release"


def settings_of(folder: Path, family: str, **changes: object) -> EncoderSettings:
    return EncoderSettings.model_validate(
        {"name": family, "model": str(tiny_llm(folder / family, family)), **changes}
    )


def test_a_probe_reads_what_is_there_and_guesses_what_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 6, (400,), generator=generator)
    noise = torch.randn(400, 64, generator=generator)
    directions = torch.randn(6, 64, generator=generator)
    scales = 10 ** torch.linspace(-3, 3, 64)  # an LLM's channels differ as much
    assert linear_probe((noise + 2 * directions[labels]) * scales, labels, 300) > 0.95
    assert linear_probe(noise * scales, labels, 300) < 0.35
    assert linear_probe(torch.ones(400, 64), labels, 300) < 0.35  # constant channels are no trouble


@pytest.mark.parametrize("style", ["bare", "clauses", "long"])
def test_the_words_are_found_in_the_text(style: str) -> None:
    vocabulary = vocabulary_for(32)
    for caption in probe_captions(style, 20):
        for colour, shape, noun, word in zip(
            caption.colours, caption.shapes, caption.noun_ends, caption.colour_ends
        ):
            assert caption.text[: noun + 1].endswith(vocabulary.shapes[shape])
            assert caption.text[: word + 1].endswith(vocabulary.colours[colour])
            assert (word < noun) == (style == "bare")


@pytest.mark.parametrize("kind", ["causal", "unmasked"])
@pytest.mark.parametrize("instruction", ["", None])
def test_every_layer_is_what_an_encoder_of_that_layer_gives(
    kind: str, instruction: str | None, tmp_path: Path
) -> None:
    settings = settings_of(tmp_path, "gemma3", kind=kind, instruction=instruction)
    whole = PromptEncoder.load(resolve_encoder(settings.model_copy(update={"layer": -1})), "cpu")
    captions = ["a red circle", "a blue square and a green cross", "a red circle", "two"]
    ids = [row.token_ids for row in whole.tokenizer.tokenize(captions)]
    found = {
        row: states[:, i] for rows, states in every_layer(whole, ids) for i, row in enumerate(rows)
    }
    assert sorted(found) == [0, 1, 2, 3]
    for block in (1, 3, 5):
        single = PromptEncoder.load(
            resolve_encoder(settings.model_copy(update={"layer": block})), "cpu"
        )
        for row, caption in enumerate(single.encode(captions)):
            torch.testing.assert_close(found[row][block - 1], caption.states, rtol=1e-4, atol=1e-4)
        if kind == "causal" and instruction is None:
            before = prefix_layers(whole)
            assert before is not None
            torch.testing.assert_close(
                before[block - 1], single.prefix_states()[1], rtol=1e-4, atol=1e-4
            )


def test_a_causal_llm_cannot_hold_at_a_noun_what_comes_after_it(tmp_path: Path) -> None:
    captions = probe_captions("clauses", 160)
    settings = settings_of(tmp_path, "llama", instruction="")
    noun = {}
    for kind in ("causal", "unmasked"):
        encoder = PromptEncoder.load(
            resolve_encoder(settings.model_copy(update={"kind": kind, "layer": -1})), "cpu"
        )
        result = probe_encoder(encoder, kind, "clauses", captions)
        assert result.accuracy["colour at its noun"].shape == (6, 4)
        noun[kind] = result.accuracy["colour at its noun"][2:].mean()
        assert all(facts.norm > 0 and 0 < facts.strongest_share <= 1 for facts in result.layers)
    # chance is 1/6; what is left is the scene's colours being different
    assert noun["causal"] < 0.3
    before = probe_encoder(
        PromptEncoder.load(resolve_encoder(settings.model_copy(update={"layer": -1})), "cpu"),
        "causal", "bare", probe_captions("bare", 160),
    )  # fmt: skip
    assert before.accuracy["colour at its noun"][:3].mean() > noun["causal"] + 0.2


def test_the_report_is_written_and_tracked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_llm(tmp_path / "llm", "llama")
    (tmp_path / "tiny.yaml").write_text(f"name: tiny\nmodel: {folder}\n")
    out = tmp_path / "study"
    words = [
        "probe",
        tmp_path / "tiny.yaml",
        "--out",
        out,
        "--captions",
        "16",
        "--style",
        "clauses",
    ]
    assert lidit(*words) == 0
    page = (out / "README.md").read_text()
    assert str(out / "README.md") in capsys.readouterr().out
    for label in ("tiny, causal, bare", "tiny, mask removed, instruction", *QUESTIONS):
        assert label in page
    assert (out / "accuracy.png").stat().st_size > 5000
    assert (tmp_path / "mlflow.db").exists()


def test_a_probe_of_a_model_goes_below_its_training(tmp_path: Path) -> None:
    run, uri = tmp_path / "runs" / "demo", tracking.local_store(tmp_path / "runs")
    shutil.copytree(RELEASED / "model", run / "model")
    for path in (run / "model" / "encoders").glob("qwen2.*"):
        path.unlink()  # one LLM is enough
    facts = json.loads((run / "model" / "encoders" / "llama.json").read_text())
    facts["settings"]["model"] = str(RELEASED / "llms" / "llama")
    (run / "model" / "encoders" / "llama.json").write_text(json.dumps(facts))
    with tracking.tracked_run(uri, "lidit", "demo", "key", {}, {}, run) as training:
        (run / tracking.RUN_FILE).write_text(training.handle.run_id)
    assert lidit("probe", "--model", run, "--captions", "16", "--style", "clauses") == 0
    client = MlflowClient(uri)
    (experiment,) = [each for each in client.search_experiments() if each.name == "lidit"]
    runs = client.search_runs([experiment.experiment_id], "tags.`lidit.job` = 'probe'")
    (tags,) = [found.data.tags for found in runs]
    assert tags[tracking.PARENT] == training.handle.run_id
    assert tags["mlflow.runName"] == "probe demo"
    description = tags["mlflow.note.content"]
    assert "the last token tells the first segment's colour" in description
    assert "(get-artifact?path=accuracy.png&run_uuid=" in description
    assert (run / "probe" / "README.md").is_file()


@pytest.mark.parametrize(
    ("words", "told"), [([], "name the LLMs"), (["--model", "elsewhere"], "no run or model here")]
)
def test_a_probe_of_nothing_is_refused(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lidit("probe", *words) == 2
    assert told in capsys.readouterr().err


def test_settings_of_one_llm(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, "llama", chat_template=True)
    names = dict(settings_grid(settings))
    assert len(names) == 4
    assert names["llama, causal, bare"].chat_template is False
    assert names["llama, mask removed, instruction"].kind == "unmasked"
    assert all(one.layer == -1 for one in names.values())
    assert (
        len(settings_grid(settings.model_copy(update={"kind": "encoder", "chat_template": False})))
        == 1
    )
    bare = dict(settings_grid(settings.model_copy(update={"instruction": ""})))
    assert bare["llama, causal, bare"].instruction == ""
    assert bare["llama, causal, instruction"].instruction is None  # the paper's
    with pytest.raises(InputError, match="at least 8"):
        probe_encoder(None, "x", "bare", [])  # type: ignore[arg-type]
