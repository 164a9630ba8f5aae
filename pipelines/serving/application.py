"""The platform as a Ray Serve application: gateway, ledger, and what draws, in one process a
replica or in stages.

gateway -> ledger -> studio                                          (together)
gateway -> ledger -> guards, encoder-NAME..., denoiser, codec, finisher      (apart)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from lidit.codecs import load_codec
from lidit.config.settings import validate
from lidit.errors import InputError
from lidit.pipeline.components import ENCODERS
from lidit.pipeline.model_encoder import ModelEncoder
from lidit.serving.shared_keys import open_keys
from lidit.text.specs import default_device
from pipelines.evaluation.models import load_pipeline, weights_digest
from pipelines.serving.api import build_api
from pipelines.serving.edge import Edge
from pipelines.serving.finisher import Finisher
from pipelines.serving.flow import Flow, Stages
from pipelines.serving.guarding import PromptGuards
from pipelines.serving.ledger import Ledger
from pipelines.serving.orders import ModelFacts
from pipelines.serving.remote import (
    RemoteDecoder,
    RemoteDenoiser,
    RemoteFinisher,
    RemoteGuards,
    RemoteLedger,
    RemoteReader,
    RemoteStudio,
)
from pipelines.serving.settings import PlaceSettings, ServeSettings
from pipelines.serving.studio import (
    check_guards,
    codec_of,
    encoder_names,
    facts_of,
    finisher_of,
    probe_of,
    prompt_guards_of,
    register_of,
    sizes_of,
    studio_of,
)
from pipelines.serving.workers import Decoder, Denoiser, Reader

NAME = "lidit"
IMPORT_PATH = f"{__name__}:build"
MANY = 10_000  # the ledger's admission limits what is in work, and says so in words
CHECK_S = 10.0


@serve.deployment
class Studio(Flow):
    """Everything that draws, in one process."""

    def __init__(self, settings: ServeSettings) -> None:
        whole = studio_of(settings)
        super().__init__(whole.known, whole.stages)

    def check_health(self) -> None:
        network = self.stages.denoiser
        if not isinstance(network, Denoiser) or not network.engine.alive:
            raise RuntimeError("the step loop has ended")


@serve.deployment
class Guards(PromptGuards):
    """What looks at prompts before anything is computed for them."""

    def __init__(self, settings: ServeSettings) -> None:
        super().__init__(prompt_guards_of(settings).guards)


@serve.deployment
class Encoder(Reader):
    """One LLM."""

    def __init__(self, settings: ServeSettings, name: str) -> None:
        super().__init__(ModelEncoder.load(Path(settings.model) / ENCODERS, name), default_device())

    async def encode(self, prompt: str) -> torch.Tensor:
        states: torch.Tensor = await self._together(prompt)
        return states

    @serve.batch(max_batch_size=64, batch_wait_timeout_s=0.005)
    async def _together(self, prompts: list[str]) -> list[torch.Tensor]:
        # The LLM's own batching keeps to a number of tokens.
        return await self.encode_all(prompts)


@serve.deployment
class Network(Denoiser):
    """The network and its step loop."""

    def __init__(self, settings: ServeSettings) -> None:
        pipeline = load_pipeline(Path(settings.model))
        self._facts = facts_of(settings, pipeline)
        name = self._facts.name
        super().__init__(name, pipeline, sizes_of(settings, pipeline), probe_of(settings, pipeline))

    async def facts(self) -> ModelFacts:
        return self._facts

    def check_health(self) -> None:
        if not self.engine.alive:
            raise RuntimeError("the step loop has ended")


@serve.deployment
class Codec(Decoder):
    """The codec."""

    def __init__(self, settings: ServeSettings) -> None:
        device = default_device()
        super().__init__(load_codec(codec_of(Path(settings.model)), device), device)


@serve.deployment
class Finishing(Finisher):
    """What looks at pictures, marks and encodes them. The signing key is read here and nowhere
    else.
    """

    def __init__(self, settings: ServeSettings) -> None:
        whole = finisher_of(settings, weights_digest(Path(settings.model)))
        super().__init__(whole.digest, whole.guard, whole.watermark, whole.signer)


@serve.deployment
class Accounts(Ledger):
    """The ledger. One replica: a second one would let everybody in once more."""

    # Serve awaits it.
    async def __init__(self, settings: ServeSettings, *stages: DeploymentHandle) -> None:  # type: ignore[misc]
        studio = RemoteStudio(stages[0]) if settings.together else await _apart(*stages)
        keys = None if settings.keys is None else open_keys(settings.keys)
        super().__init__(
            Path(settings.folder), studio, settings.limits, register_of(settings), keys
        )

    async def __del__(self) -> None:
        await self.close()


class Apart(Flow):
    """A flow of deployments. Its facts are the network's own, which an update may replace."""

    def __init__(self, network: DeploymentHandle, facts: ModelFacts, stages: Stages) -> None:
        super().__init__(facts, stages)
        self._network = RemoteStudio(network)

    async def facts(self) -> ModelFacts:
        return await self._network.facts()


async def _apart(*handles: DeploymentHandle) -> Flow:
    """A flow of which every stage is a deployment: guards, network, codec, finishing, then the
    encoders in their order.
    """
    guards, network, codec, finishing, *encoders = handles
    facts: ModelFacts = await network.facts.remote()
    readers = {
        name: RemoteReader(handle) for name, handle in zip(facts.encoders, encoders, strict=True)
    }
    drawing = RemoteDenoiser(network), RemoteDecoder(codec), RemoteFinisher(finishing)
    return Apart(network, facts, Stages(RemoteGuards(guards), readers, *drawing))


@serve.deployment
@serve.ingress()
class Gateway:
    """HTTP. Any number of replicas: what they must agree on is in the ledger."""

    def __init__(self, settings: ServeSettings, ledger: DeploymentHandle) -> None:
        self.settings, self.ledger = settings, ledger

    def __serve_build_asgi_app__(self) -> Edge:
        return build_api(RemoteLedger(self.ledger), self.settings)


def build(arguments: dict[str, Any]) -> Application:
    """The application of a Serve config, whose `args` are `ServeSettings`."""
    return application(validate(ServeSettings, arguments, "args"))


def application(settings: ServeSettings) -> Application:
    """Raises InputError for settings that nobody should serve with."""
    check_guards(settings)
    if settings.ledger.replicas != 1 or settings.ledger.surge_percent:
        raise InputError("ledger: one replica, without surge: two would let everybody in twice")
    stages = (
        [_placed(Studio, settings.studio, settings, settings)]
        if settings.together
        else _stages(settings)
    )
    ledger = _placed(Accounts, settings.ledger, settings, settings, *stages)
    return _placed(
        Gateway,
        PlaceSettings(replicas=settings.gateways, surge_percent=100),
        settings,
        settings,
        ledger,
    )


def places_of(settings: ServeSettings) -> list[PlaceSettings]:
    """What is asked of the cluster, by each deployment."""
    apart = settings.apart
    encoders = [apart.encoder] * len(encoder_names(Path(settings.model)))
    stages = [apart.guard, apart.denoiser, apart.codec, apart.finisher, *encoders]
    return [settings.ledger, *([settings.studio] if settings.together else stages)]


def _stages(settings: ServeSettings) -> list[Application]:
    places = settings.apart
    guards = _placed(Guards, places.guard, settings, settings)
    network = _placed(Network, places.denoiser, settings, settings)
    codec = _placed(Codec, places.codec, settings, settings)
    finishing = _placed(Finishing, places.finisher, settings, settings)
    encoder: Any = Encoder
    encoders = [
        _placed(encoder.options(name=f"Encoder-{name}"), places.encoder, settings, settings, name)
        for name in encoder_names(Path(settings.model))
    ]
    return [guards, network, codec, finishing, *encoders]


def _placed(
    deployment: Any, place: PlaceSettings, settings: ServeSettings, *arguments: Any
) -> Application:
    """A deployment with its replicas. A replica that ends may first finish the longest request
    there can be.
    """
    asked: dict[str, Any] = {"num_cpus": place.cpus, "num_gpus": place.gpus}
    if place.resources:
        asked["resources"] = dict(place.resources)
    return deployment.options(
        num_replicas=place.replicas,
        ray_actor_options=asked,
        max_ongoing_requests=MANY,
        max_surge_percent=place.surge_percent,
        graceful_shutdown_timeout_s=settings.limits.deadline_s + 30,
        health_check_period_s=CHECK_S,
        logging_config={"log_level": settings.log_level, "enable_access_log": False},
    ).bind(*arguments)
