"""The facts of a plan: read from the corpus and the models where these exist, else from the
recipe's `plan`.
"""

from __future__ import annotations

import math
from pathlib import Path

from lidit.config import EncoderSettings, EncoderShape, Recipe
from lidit.data.matching import matching_family
from lidit.errors import InputError, StorageError
from lidit.plan import Facts, PlannedEncoder
from lidit.store import Corpus, TextFamily
from lidit.store.corpus import CORPUS_FILE
from lidit.store.distinct import count_distinct
from lidit.store.files.folder import Folder
from lidit.store.rolling import RollingTextFamily
from lidit.text.packaged import MODELS, PREFIX, cache_folder
from lidit.text.rules import joined_width, resolve_reading


def gather_facts(recipe: Recipe) -> Facts:
    """Raises InputError naming the setting to give for everything that is neither measured nor
    assumed yet.
    """
    corpus = _corpus(recipe)
    assumed = recipe.plan
    if assumed.samples is None and corpus is None:
        raise InputError(f"the corpus {recipe.corpus} does not exist yet; give plan.samples=NUMBER")
    samples = assumed.samples or (corpus.num_samples if corpus else 0)
    per_sample = (
        corpus.facts["totals"]["captions"] / corpus.num_samples
        if corpus
        else assumed.captions_per_sample
    )
    tokens, prefixes, encoders, coded_bits = {}, {}, {}, {}
    for encoder in recipe.encoders:
        encoders[encoder.name] = planned_encoder(encoder, recipe)
        family = _family(corpus, encoder)
        if family is not None:
            tokens[encoder.name] = family.manifest["tokens"] / max(1, family.manifest["rows"])
            if family.spec["storage"] == "coded":
                coded_bits[encoder.name] = (
                    8 * family.manifest["bytes"] / (family.manifest["tokens"] * family.width)
                )
            prefixes[encoder.name] = len(family.shared().prefix)
        else:
            prefixes[encoder.name] = 0 if encoder.kind == "encoder" else assumed.prefix_tokens
            tokens[encoder.name] = _stored_tokens(
                encoder, assumed.caption_tokens, prefixes[encoder.name]
            )
    pixels = recipe.codec.model is None
    return Facts(
        samples=samples,
        captions=max(samples, round(samples * per_sample)),
        repeated=_repeated(corpus),
        caption_tokens=tokens,
        prefix_tokens=prefixes,
        encoders=encoders,
        latent=_latent(recipe, corpus),
        latent_storage="uint8" if pixels else recipe.codec.storage,
        posterior=not pixels and recipe.codec.posterior == "sample",
        coded_bits=coded_bits,
    )


def planned_encoder(encoder: EncoderSettings, recipe: Recipe) -> PlannedEncoder:
    """What of an encoder's model runs and is stored. InputError for a layer that the
    model lacks.
    """
    shape = encoder_shape(encoder, recipe)
    blocks, reading = resolve_reading(encoder, shape.blocks)
    return PlannedEncoder(
        shape=shape,
        blocks=blocks,
        width=joined_width(reading, shape.width),
        layers=len(reading.layers or ()) if encoder.keeps_layers_apart else 1,
        pooled=shape.width if encoder.pooled else 0,
    )


def _stored_tokens(encoder: EncoderSettings, caption_tokens: float, prefix: int) -> float:
    """Tokens of a caption on disk, where a caption has `caption_tokens`; padding is there where
    states depend on it.
    """
    longest = max(1, encoder.max_tokens - (prefix if encoder.counted == "whole" else 0))
    if encoder.padding is None:
        return min(caption_tokens, longest)
    if encoder.padding.multiple_of is None:
        return longest
    return min(
        longest,
        math.ceil(caption_tokens / encoder.padding.multiple_of) * encoder.padding.multiple_of,
    )


def _repeated(corpus: Corpus | None) -> float | None:
    """The share of a corpus's captions that an earlier unit has too; None before ingest, and for
    very large ones.
    """
    distinct = None if corpus is None else count_distinct(corpus)
    if corpus is None or distinct is None:
        return None
    return 1 - distinct / max(1, corpus.facts["totals"]["captions"])


def _corpus(recipe: Recipe) -> Corpus | None:
    """The recipe's corpus, or None before ingest.

    Also None where its store cannot be reached and `plan.samples` is given: plans are made far from
    the store too.
    """
    try:
        there = Folder.at(recipe.corpus).exists(CORPUS_FILE)
    except (InputError, StorageError):
        if recipe.plan.samples is None:
            raise
        return None
    return Corpus.open(recipe.corpus) if there else None


def _family(corpus: Corpus | None, encoder: EncoderSettings) -> TextFamily | None:
    """The recipe's text family, or None if it is missing, unfinished or was made with other
    settings.

    A plan works without it.
    """
    try:
        family = None if corpus is None else matching_family(corpus, encoder)
    except InputError:
        return None
    return None if isinstance(family, RollingTextFamily) else family  # it knows no totals


def _latent(recipe: Recipe, corpus: Corpus | None) -> tuple[int, int, int]:
    if recipe.plan.latent:
        return recipe.plan.latent
    if corpus is not None:
        for handle in corpus.latent_families():
            # a retrained codec's have the same shape
            if handle.name == recipe.codec.name and handle.complete:
                return corpus.latent_family(handle.directory).shapes(0)[0]
    if recipe.codec.model is None:
        side = recipe.ingest.resolution * recipe.codec.scale
        return (3, side, side)
    raise InputError(
        f"plan.latent: the corpus has no latents of codec {recipe.codec.name!r} yet; give "
        "[channels, height, width]"
    )


def encoder_shape(encoder: EncoderSettings, recipe: Recipe) -> EncoderShape:
    """Width, blocks and parameters of one block: from `plan.encoders`, else from a model folder on
    this machine.
    """
    if encoder.name in recipe.plan.encoders:
        return recipe.plan.encoders[encoder.name]
    folder = Path(encoder.model).expanduser()
    if encoder.model.startswith(PREFIX) and (name := encoder.model.removeprefix(PREFIX)) in MODELS:
        made = sorted((cache_folder() / "models").glob(f"{name}-{MODELS[name].sha256[:12]}-*"))
        folder = made[-1] if made else folder
    if not (folder / "config.json").is_file():
        raise InputError(
            f"plan.encoders.{encoder.name}: {encoder.model} is not on this machine; give its "
            "{width, blocks, block_parameters}"
        )
    return shape_of_folder(folder)


def shape_of_folder(folder: Path) -> EncoderShape:
    """The language model of a Hugging Face folder, built without its weights."""
    import torch
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    text = config.get_text_config()
    with torch.device("meta"):
        model = AutoModel.from_config(text, trust_remote_code=False)
    blocks = int(text.num_hidden_layers)
    inside = sum(
        p.numel()
        for name, p in model.named_parameters()
        if {"layers", "layer", "block"} & set(name.split("."))
    )
    return EncoderShape(
        width=int(text.hidden_size), blocks=blocks, block_parameters=round(inside / blocks)
    )
