"""Which codec `lidit latents` computes: the one of a recipe is the one its training looks for."""

import pytest

from jobs.latents import codec_settings
from lidit.config import CodecSettings
from lidit.config.shipped import load_recipe
from lidit.errors import InputError
from tests.helpers.command import lidit


@pytest.mark.parametrize("recipe", ["lidit-1b", "lidit-10b", "demo"])
def test_a_recipes_codec_is_the_one_that_is_computed(recipe: str) -> None:
    assert codec_settings(None, None, None, recipe, []) == load_recipe(recipe).codec


def test_settings_can_be_given_one_by_one() -> None:
    assert codec_settings(None, None, None, None, []) == CodecSettings()
    assert codec_settings("pixels", None, None, None, ["scale=2"]) == CodecSettings(scale=2)
    made = codec_settings("models/VAE/", None, None, None, ["storage=bfloat16", "posterior=mean"])
    assert made == CodecSettings(
        name="vae", model="models/VAE/", storage="bfloat16", posterior="mean"
    )
    assert codec_settings("./vae", "mine", "a" * 40, None, []).revision == "a" * 40


def test_a_recipe_beside_a_codec_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="--recipe names the codec"):
        codec_settings("./vae", None, None, "demo", [])
    assert lidit("latents", "nowhere", "--set", "storage=int8") == 2
    assert "storage" in capsys.readouterr().err
