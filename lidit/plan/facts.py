"""The facts of a plan: read from the corpus and the models where these exist, else from the recipe's `plan`."""

from __future__ import annotations

from pathlib import Path

from lidit.config import EncoderSettings, EncoderShape, Recipe
from lidit.data.matching import matching_family
from lidit.errors import InputError, StorageError
from lidit.plan import Facts, kept_blocks
from lidit.store import Corpus, TextFamily
from lidit.store.corpus import CORPUS_FILE
from lidit.store.files.folder import Folder
from lidit.text.packaged import MODELS, PREFIX, cache_folder


def gather_facts(recipe: Recipe) -> Facts:
    """Raises InputError naming the setting to give for everything that is neither measured nor assumed yet."""
    corpus = _corpus(recipe)
    assumed = recipe.plan
    if assumed.samples is None and corpus is None:
        raise InputError(f"the corpus {recipe.corpus} does not exist yet; give plan.samples=NUMBER")
    samples = assumed.samples or (corpus.num_samples if corpus else 0)
    per_sample = corpus.facts["totals"]["captions"] / corpus.num_samples if corpus else assumed.captions_per_sample
    tokens, prefixes, shapes = {}, {}, {}
    for encoder in recipe.encoders:
        if encoder.layers is not None:
            raise InputError(f"encoder {encoder.name}: plans are made for encoders of one layer; set layer, not layers")
        shapes[encoder.name] = encoder_shape(encoder, recipe)
        if not 1 <= kept_blocks(shapes[encoder.name], encoder.layer) <= shapes[encoder.name].blocks:
            raise InputError(
                f"encoder {encoder.name}: layer {encoder.layer} does not exist; "
                f"the model has {shapes[encoder.name].blocks} blocks"
            )
        family = _family(corpus, encoder)
        if family is not None:
            tokens[encoder.name] = family.manifest["tokens"] / max(1, family.manifest["rows"])
            prefixes[encoder.name] = len(family.shared().prefix)
        else:
            tokens[encoder.name] = min(assumed.caption_tokens, encoder.max_tokens)
            prefixes[encoder.name] = 0 if encoder.kind == "encoder" else assumed.prefix_tokens
    pixels = recipe.codec.model is None
    return Facts(
        samples=samples,
        captions=max(samples, round(samples * per_sample)),
        caption_tokens=tokens,
        prefix_tokens=prefixes,
        encoders=shapes,
        latent=_latent(recipe, corpus),
        latent_storage="uint8" if pixels else recipe.codec.storage,
        posterior=not pixels and recipe.codec.posterior == "sample",
    )


def _corpus(recipe: Recipe) -> Corpus | None:
    """The recipe's corpus, or None before ingest.

    Also None where its store cannot be reached and `plan.samples` is given: plans are made far from the store too.
    """
    try:
        there = Folder.at(recipe.corpus).exists(CORPUS_FILE)
    except (InputError, StorageError):
        if recipe.plan.samples is None:
            raise
        return None
    return Corpus.open(recipe.corpus) if there else None


def _family(corpus: Corpus | None, encoder: EncoderSettings) -> TextFamily | None:
    """The recipe's text family, or None if it is missing, unfinished or was made with other settings.

    A plan works without it.
    """
    try:
        return None if corpus is None else matching_family(corpus, encoder)
    except InputError:
        return None


def _latent(recipe: Recipe, corpus: Corpus | None) -> tuple[int, int, int]:
    if recipe.plan.latent:
        return recipe.plan.latent
    if corpus is not None:
        for handle in corpus.latent_families():
            if handle.name == recipe.codec.name and handle.complete:  # a retrained codec's have the same shape
                return corpus.latent_family(handle.directory).shapes(0)[0]
    if recipe.codec.model is None:
        side = recipe.ingest.resolution * recipe.codec.scale
        return (3, side, side)
    raise InputError(
        f"plan.latent: the corpus has no latents of codec {recipe.codec.name!r} yet; give [channels, height, width]"
    )


def encoder_shape(encoder: EncoderSettings, recipe: Recipe) -> EncoderShape:
    """Width, blocks and parameters of one block: from `plan.encoders`, else from a model folder on this machine."""
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
        p.numel() for name, p in model.named_parameters() if {"layers", "layer", "block"} & set(name.split("."))
    )
    return EncoderShape(width=int(text.hidden_size), blocks=blocks, block_parameters=round(inside / blocks))
