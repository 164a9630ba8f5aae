"""Every setting of the online platform; a file of settings for `lidit serve` is one
`ServeSettings`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lidit.config.fields import Place
from lidit.config.settings import Settings
from lidit.serving.guards.images import OnnxSettings
from lidit.serving.guards.language import LanguageGuardSettings

Positive = Annotated[float, Field(gt=0)]
Level = Annotated[int, Field(ge=0, le=255)]


class LimitSettings(Settings):
    """What one request, one key and everybody together may ask for."""

    images: int = Field(10, ge=1, le=10, description="of one request")
    pixels: int = Field(1 << 22, ge=1, description="of one image")
    aspect: float = Field(4.0, ge=1, description="long side / short side")
    steps: int = Field(100, ge=1, le=1000)
    prompt_characters: int = Field(4000, ge=1)
    body_bytes: int = Field(64 << 10, ge=1024)
    verified_bytes: int = Field(
        20 << 20, ge=1024, description="of a picture that is to be recognised"
    )
    queue_units: int = Field(
        4_000_000_000, ge=1, description="pixels x steps that may wait or be in work"
    )
    key_share: float = Field(0.5, gt=0, le=1, description="of the queue that one key may fill")
    deadline_s: Positive = 300.0
    keep_s: float = Field(3600, ge=60, description="how long finished pictures can be fetched")
    keep_bytes: int = Field(512 << 20, ge=1 << 20, description="of finished pictures")


class PlaceSettings(Settings):
    """What the replicas of one deployment get."""

    replicas: int = Field(1, ge=1)
    cpus: float = Field(0, ge=0)
    gpus: float = Field(0, ge=0)
    resources: dict[str, float] = Field(
        default_factory=dict, description="custom Ray resources of each"
    )
    surge_percent: int = Field(
        0, ge=0, le=100, description="new replicas beside the old ones while they are replaced"
    )


class ApartSettings(Settings):
    """Deployments of their own for each stage, where `together` is false."""

    guard: PlaceSettings = PlaceSettings(cpus=1)
    encoder: PlaceSettings = PlaceSettings(cpus=1)
    denoiser: PlaceSettings = PlaceSettings(cpus=1)
    codec: PlaceSettings = PlaceSettings(cpus=1)
    finisher: PlaceSettings = PlaceSettings(cpus=1)


class PixelRuleSettings(Settings):
    """Refuse pictures of which `share` is near a colour."""

    colour: tuple[Level, Level, Level]
    share: float = Field(gt=0, le=1)
    distance: Positive = 60.0


class GuardSettings(Settings):
    """What looks at prompts and pictures. `needed`: refuse to start without one of each."""

    words: Place | None = Field(None, description="text file: one forbidden word or phrase a line")
    probe: Place | None = Field(None, description="what `lidit guard train` wrote")
    language_model: LanguageGuardSettings | None = Field(
        None, description="Llama Guard or ShieldGemma, of prompts"
    )
    classifier: OnnxSettings | None = None
    pixel_rule: PixelRuleSettings | None = None
    image_threshold: float = Field(0.5, gt=0, le=1)
    deadline_s: Positive = 10.0
    needed: bool = Field(True, description="false: draw every prompt, on one's own machine say")


class ProvenanceSettings(Settings):
    """How pictures are marked. `certificates` and `key`: PEM files of the C2PA signer."""

    certificates: Place | None = None
    key: Place | None = None
    roots: Place | None = Field(
        None, description="PEM of certificates that are trusted when pictures are verified"
    )
    watermark: bool = Field(
        True, description="an invisible mark in pictures of 256 pixels and more"
    )


class ServeSettings(Settings):
    """One model behind one address.

    `folder` holds what must survive a restart: keys, quotas and the audit log.
    """

    model: Place
    name: str | None = Field(
        None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="of the model, for clients"
    )
    folder: Place = "serving"
    keys: Place | None = Field(
        None,
        pattern=r"^(rediss?|unix)://",
        description="Redis for keys and quotas, in place of FOLDER/keys.sqlite",
    )
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=1, le=65535)
    public_url: str | None = Field(
        None, pattern=r"^https?://[^\s?#]+$", description="where clients reach the host"
    )
    sizes: tuple[tuple[int, int], ...] = Field(
        (), description="(height, width) to measure at the start"
    )
    together: bool = Field(True, description="LLMs, network and codec in one process each replica")
    gateways: int = Field(1, ge=1)
    ledger: PlaceSettings = PlaceSettings()
    studio: PlaceSettings = PlaceSettings()
    apart: ApartSettings = ApartSettings()
    limits: LimitSettings = LimitSettings()
    guards: GuardSettings = GuardSettings()
    provenance: ProvenanceSettings = ProvenanceSettings()
    traces: bool = Field(
        False, description="spans to the collector that OTEL_EXPORTER_OTLP_ENDPOINT names"
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "WARNING"
