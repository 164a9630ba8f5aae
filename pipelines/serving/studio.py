"""From a model folder and settings to what draws its orders, in this process or stage by stage.

A cluster's processes read `settings.folder` from a volume that they share; on one machine it is a
folder.
"""

from __future__ import annotations

from pathlib import Path

from lidit.config import CodecSettings
from lidit.config.json_object import read_object
from lidit.config.settings import validate
from lidit.errors import InputError
from lidit.pipeline import INDEX, LIDiTPipeline
from lidit.pipeline.components import VAE
from lidit.serving.audit import load_key
from lidit.serving.guards.guard import Guard
from lidit.serving.guards.images import OnnxClassifier, PixelRule
from lidit.serving.guards.language import LanguageGuard
from lidit.serving.guards.probe import Probe, States
from lidit.serving.guards.words import WordList
from lidit.serving.provenance.manifest import ManifestSigner
from lidit.serving.provenance.watermark import Watermark
from pipelines.evaluation.models import load_pipeline, read_index, weights_digest
from pipelines.serving.finisher import Finisher, Pixels
from pipelines.serving.flow import Flow, Stages
from pipelines.serving.guarding import PromptGuards
from pipelines.serving.issued import Register
from pipelines.serving.orders import ModelFacts
from pipelines.serving.settings import ServeSettings
from pipelines.serving.workers import Decoder, Denoiser, Reader

MARK_KEY = "watermark.key"


def studio_of(settings: ServeSettings) -> Flow:
    """Everything that draws, in this process."""
    pipeline = load_pipeline(Path(settings.model))
    facts = facts_of(settings, pipeline)
    device = str(pipeline.model.device)
    stages = Stages(
        prompt_guards_of(settings),
        {name: Reader(encoder, device) for name, encoder in pipeline.encoders.items()},
        Denoiser(facts.name, pipeline, sizes_of(settings, pipeline), probe_of(settings, pipeline)),
        Decoder(pipeline.codec, device),
        finisher_of(settings, facts.digest),
    )
    return Flow(facts, stages)


def sizes_of(settings: ServeSettings, pipeline: LIDiTPipeline) -> tuple[tuple[int, int], ...]:
    """(height, width) whose row caps are measured before anybody waits for them."""
    return settings.sizes or ((pipeline.config.height, pipeline.config.width),)


def encoder_names(model: Path) -> list[str]:
    """The model's encoders in the order of their states, without loading it."""
    config = read_object(model / "model" / "config.json", "copy the model folder again")
    return sorted(config["encoders"])


def codec_of(model: Path) -> CodecSettings:
    """The codec of a model folder, without its network."""
    codec = validate(CodecSettings, read_index(model)["codec"] or {}, f"{model / INDEX}: codec")
    return codec.model_copy(update={"model": str(model / VAE)}) if codec.model == VAE else codec


def facts_of(settings: ServeSettings, pipeline: LIDiTPipeline) -> ModelFacts:
    """What requests are checked against."""
    folder = Path(settings.model)
    return ModelFacts(
        settings.name or name_of(folder),
        weights_digest(folder),
        int((folder / INDEX).stat().st_mtime),
        pipeline.config.height,
        pipeline.config.width,
        pipeline.codec.factor * pipeline.model.config.patch_size,
        pipeline.sampler.steps,
        pipeline.sampler.guidance_scale,
        tuple(pipeline.objective.schedulers),
        tuple(pipeline.encoders),
        pipeline.model.takes_guidance,
    )


def name_of(folder: Path) -> str:
    """A model's name for clients: of its run, since every run's model is called model."""
    folder = folder.resolve()
    name = folder.parent.name if folder.name == "model" else folder.name
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in name).strip(
        "._-"
    )
    return kept[:64] or "lidit"


def finisher_of(settings: ServeSettings, digest: str) -> Finisher:
    marks = settings.provenance
    signer = None
    if marks.certificates is not None and marks.key is not None:
        signer = ManifestSigner.from_files(Path(marks.certificates), Path(marks.key))
    return Finisher(digest, image_guard_of(settings), watermark_of(settings), signer)


def watermark_of(settings: ServeSettings) -> Watermark | None:
    """The same secret wherever pictures are marked or recognised; made with the first of them."""
    if not settings.provenance.watermark:
        return None
    folder = Path(settings.folder)
    folder.mkdir(parents=True, exist_ok=True)
    return Watermark(load_key(folder / MARK_KEY))


def register_of(settings: ServeSettings) -> Register:
    roots = settings.provenance.roots
    text = Path(roots).read_text() if roots is not None else None
    return Register(Path(settings.folder), watermark_of(settings), text)


def words_of(settings: ServeSettings) -> Guard[str] | None:
    guards = settings.guards
    if guards.words is None:
        return None
    return Guard("words", WordList(Path(guards.words)), 1.0, guards.deadline_s)


def prompt_guards_of(settings: ServeSettings) -> PromptGuards:
    """The list first: it costs nothing, and what it refuses no language model need judge."""
    asked, found = settings.guards.language_model, [words_of(settings)]
    if asked is not None:
        found.append(
            Guard("language_model", LanguageGuard(asked), asked.threshold, asked.deadline_s)
        )
    return PromptGuards([guard for guard in found if guard is not None])


def probe_of(settings: ServeSettings, pipeline: LIDiTPipeline) -> Guard[States] | None:
    guards = settings.guards
    if guards.probe is None:
        return None
    fingerprints = {name: encoder.fingerprint for name, encoder in pipeline.encoders.items()}
    probe = Probe.load(Path(guards.probe), fingerprints)
    return Guard("probe", probe, probe.threshold, guards.deadline_s)


def image_guard_of(settings: ServeSettings) -> Guard[Pixels] | None:
    guards = settings.guards
    if guards.classifier is not None:
        return Guard(
            "classifier",
            OnnxClassifier(guards.classifier),
            guards.image_threshold,
            guards.deadline_s,
        )
    if guards.pixel_rule is not None:
        rule = guards.pixel_rule
        checker = PixelRule(rule.colour, rule.share, rule.distance)
        return Guard("pixel_rule", checker, guards.image_threshold, guards.deadline_s)
    return None


def check_guards(settings: ServeSettings) -> None:
    """Raises InputError where guards are needed and there are none: nobody shall find out by the
    first picture.
    """
    guards = settings.guards
    if not guards.needed:
        return
    if guards.words is None and guards.probe is None and guards.language_model is None:
        raise InputError(
            "guards: no guard of prompts; give guards.words, guards.probe or "
            "guards.language_model, or "
            "guards.needed=false"
        )
    if guards.classifier is None and guards.pixel_rule is None:
        raise InputError(
            "guards: no guard of pictures; give guards.classifier, or guards.needed=false"
        )
