"""The study of LLM states: every encoder is probed, the report is written and tracked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lidit.config import EncoderSettings, TrackingSettings
from lidit.errors import InputError
from lidit.evals.probes.probe import ProbeResult, probe_captions, probe_encoder, settings_grid
from lidit.evals.probes.report import ACCURACY_PLOT, NORMS_PLOT, metrics, write_probe_report
from lidit.store import Corpus
from lidit.text import PromptEncoder, resolve_encoder
from pipelines.evaluation.scorecard import Job, Scorecard
from pipelines.runtime.progress import ProgressBar


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


def run_probe(
    encoders: Sequence[EncoderSettings],
    styles: Sequence[str],
    count: int,
    out: Path,
    tracker: TrackingSettings,
    title: str = "What the states of a prompt hold",
) -> Path:
    """Probe every LLM with and without instruction, causal and with the mask removed; returns the
    report's page.

    Raises InputError for a model that cannot be loaded and a caption style that cannot describe
    four objects.
    """
    # No score file: a call probes anew.
    names = [settings.name for settings in encoders]
    params = {"encoders": ", ".join(names), "styles": ", ".join(styles), "captions": str(count)}
    job = Job(f"probe {' '.join(names)}", out.resolve().parent, {"lidit.job": "probe"}, params)
    probed = [settings.model_dump(mode="json") for settings in encoders]
    card = Scorecard(
        out, job, {"probe": probed, "styles": list(styles), "captions": count}, tracker
    )
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
        page = write_probe_report(out, results, title)
        card.publish(metrics(results), [page.name, ACCURACY_PLOT, NORMS_PLOT])
        return page
