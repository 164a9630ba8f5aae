"""The study of LLM states: every encoder is probed, the report is written and tracked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lidit.config import EncoderSettings, TrackingSettings
from lidit.errors import InputError
from lidit.evals.probes.probe import ProbeResult, probe_captions, probe_encoder, settings_grid
from lidit.evals.probes.report import (
    ACCURACY_PLOT,
    NORMS_PLOT,
    findings,
    metrics,
    write_probe_report,
)
from lidit.pipeline.components import ENCODERS
from lidit.pipeline.model_encoder import ModelEncoder
from lidit.store import Corpus
from lidit.text import PromptEncoder, resolve_encoder
from pipelines.evaluation.scorecard import Job, Scorecard
from pipelines.runtime.progress import ProgressBar

TITLE = "What the states of a prompt hold"


def corpus_encoders(corpus: Corpus) -> list[EncoderSettings]:
    """The LLMs behind a corpus's finished text families, one per model: with an instruction where a
    family has one.

    Raises InputError for a corpus without a finished family.
    """
    encoders: dict[str, EncoderSettings] = {}
    for handle in corpus.text_families():
        if handle.complete:
            manifest = corpus.text_family(handle.directory).manifest
            settings = EncoderSettings.model_validate(manifest["extra"]["encoder"])
            if settings.model not in encoders or encoders[settings.model].instruction == "":
                encoders[settings.model] = settings
    if not encoders:
        raise InputError(
            f"{corpus.folder.location}: no finished text family to take LLMs from; run "
            "lidit embed first"
        )
    return list(encoders.values())


def model_encoders(model: Path) -> list[EncoderSettings]:
    """The LLMs that a model folder's prompts are read by.

    Raises InputError for a folder without them, and for damaged files.
    """
    folder = model / ENCODERS
    names = sorted(path.stem for path in folder.glob("*.json"))
    if not names:
        raise InputError(f"{folder}: no LLMs here; name those to probe, or copy the model again")
    return [ModelEncoder.load(folder, name).settings for name in names]


def run_probe(
    encoders: Sequence[EncoderSettings],
    styles: Sequence[str],
    count: int,
    out: Path,
    tracker: TrackingSettings,
    model: Path | None = None,
) -> Path:
    """Probe every LLM with and without instruction, causal and with the mask removed; returns the
    report's page.

    model: folder OUTPUT/NAME/model below whose training the probe is tracked.
    Raises InputError for a model that cannot be loaded and a caption style that cannot describe
    four objects.
    """
    # No score file: a call probes anew.
    names = [settings.name for settings in encoders]
    params = {"encoders": ", ".join(names), "styles": ", ".join(styles), "captions": str(count)}
    about = f"What the states of {' and '.join(names)} hold."
    made_with: dict[str, Any] = {
        "probe": [settings.model_dump(mode="json") for settings in encoders],
        "styles": list(styles),
        "captions": count,
    }
    if model is None:
        home, tags = out.resolve().parent, {"lidit.job": "probe"}
        job = Job(f"probe {' '.join(names)}", home, tags, params, about=about)
    else:
        # Below the training, and none of the model's own scores: its LLMs were never trained.
        of_model = Job.of_model("probe", model, "probe", params, prefix="")
        job = replace(of_model, training="", about=f"{about} {of_model.about}")
        # Two models of the same LLMs have a run each.
        made_with["model"] = str(model.resolve())
    card = Scorecard(out, job, made_with, tracker)
    with card.evaluating():
        captions = {style: probe_captions(style, count) for style in styles}
        grid = [entry for settings in encoders for entry in settings_grid(settings)]
        results: list[ProbeResult] = []
        with ProgressBar("probe", len(grid) * len(styles), "settings") as progress:
            for name, settings in grid:
                encoder = PromptEncoder.load(resolve_encoder(settings))
                for style in styles:
                    results.append(probe_encoder(encoder, name, style, captions[style]))
                    progress.advance(1, name)
        # Track the report.
        card.begin()
        page = write_probe_report(out, results, TITLE)
        files, found = [page.name, ACCURACY_PLOT, NORMS_PLOT], "\n".join(findings(results))
        card.publish(metrics(results), files, {"table": found})
        return page
