"""Which of a corpus's families a recipe means: found by their settings, not by name alone."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from lidit.codecs import codec_spec
from lidit.config import CodecSettings, EncoderSettings
from lidit.errors import InputError
from lidit.store import Corpus, TextFamily, spec_differences
from lidit.text.rules import Reading, TextRules, resolve_reading, set_fields, text_rules
from lidit.text.specs import STORAGE_ERROR


def matching_family(corpus: Corpus, encoder: EncoderSettings) -> TextFamily:
    """The corpus's text family with the encoder's settings.

    The model's files are not read, because trainers need not have them. Raises InputError naming
    the fields in which the corpus's families differ, and where two families fit.
    """
    wanted = encoder.model_dump(
        mode="json",
        include={"kind", "system_prompt", "instruction", "chat_template", "template_date"}
        | {"max_tokens", "storage", "dtype"},
    )
    wanted = {k: v for k, v in wanted.items() if v not in ("auto", "compute", None)}
    if encoder.storage == "coded":
        wanted["storage_error"] = encoder.storage_error or STORAGE_ERROR
    differences, matches = [], []
    for handle in corpus.text_families():
        if handle.name != encoder.name:
            continue
        spec = handle.spec
        asked = {**wanted, **_of_rules(encoder, spec["total_blocks"])}
        found = {key: spec.get(key) for key in asked}
        if found == asked:
            matches.append(handle)
        differences += [f"{handle.directory}: {line}" for line in spec_differences(found, asked)]
    complete = [handle for handle in matches if handle.complete] or [
        handle for handle in matches if handle.rolling
    ]
    if len(complete) > 1:
        listed = "\n  ".join(spec_differences(complete[0].spec, complete[1].spec))
        raise InputError(
            f"{corpus.folder.location}: {complete[0].directory} and {complete[1].directory} "
            "both fit encoder "
            f"{encoder.name!r}; they differ in:\n  {listed}\ndelete the one that is not meant"
        )
    if matches:
        return corpus.text_family((complete or matches)[0].fingerprint, rolling=True)
    if differences:
        raise _no_match(
            corpus, "text", encoder.name, differences, "compute it with lidit embed", "encoder"
        )
    return corpus.text_family(encoder.name)  # raises InputError, listing the families


def _of_rules(encoder: EncoderSettings, total_blocks: int) -> dict[str, Any]:
    """What a family's spec must say of blocks and text; None where it must not say it."""
    blocks, reading = resolve_reading(encoder, total_blocks)
    said = {**set_fields(reading), **set_fields(text_rules(encoder))}
    names = [field.name for rules in (Reading, TextRules) for field in fields(rules)]
    return {"blocks": blocks, **{name: said.get(name) for name in names}}


def matching_latents(corpus: Corpus, codec: CodecSettings) -> str:
    """The fingerprint of the corpus's latents of this codec and weights; of any dtype for `auto`.

    Raises InputError naming the fields in which the corpus's latents differ.
    """
    wanted = codec_spec(codec)
    free = {key: wanted[key] for key in {"dtype"} & set(wanted) if codec.dtype == "auto"}
    named = [handle for handle in corpus.latent_families() if handle.name == codec.name]
    differing = {
        handle.directory: spec_differences({**handle.spec, **free}, wanted) for handle in named
    }
    matches = [handle for handle in named if not differing[handle.directory]]
    if named and not matches:
        differences = [
            f"{directory}: {line}" for directory, lines in differing.items() for line in lines
        ]
        raise _no_match(
            corpus,
            "latents",
            codec.name,
            differences,
            "compute it with lidit latents --recipe",
            "codec",
        )
    complete = [handle for handle in matches if handle.complete]
    if len(complete) > 1:
        listed = ", ".join(f"{handle.directory} ({handle.spec['dtype']})" for handle in complete)
        raise InputError(
            f"{corpus.folder.location}: latents of codec {codec.name!r} in several dtypes: "
            f"{listed}; set codec.dtype"
        )
    # Raises InputError, listing the families, where none has this name or the one that matches is
    # unfinished.
    return corpus.latent_family(
        next((handle.directory for handle in [*complete, *matches]), codec.name)
    ).fingerprint


def _no_match(
    corpus: Corpus, kind: str, name: str, differences: list[str], remedy: str, section: str
) -> InputError:
    listed = "\n  ".join(differences)
    return InputError(
        f"{corpus.folder.location}: no {kind} family {name!r} with the recipe's settings; found "
        "-> wanted:\n"
        f"  {listed}\n{remedy}, or change the recipe's {section}"
    )
