"""Training on several layers of an LLM: goes on after an interruption with the same bits, and the
model draws.
"""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lidit.config import PoolSettings
from lidit.errors import InputError
from lidit.pipeline import LIDiTPipeline
from lidit.store import Corpus
from pipelines.corpus.embed import run_embed
from pipelines.training import checkpoints
from pipelines.training.train import run_facts, train
from tests.helpers.trained import SmallWorld

FINAL = "model/diffusion_pytorch_model.safetensors"


@pytest.mark.slow
def test_a_run_on_several_layers_goes_on_with_the_same_bits(
    small_world: SmallWorld, tmp_path: Path
) -> None:
    corpus = shutil.copytree(small_world.corpus, tmp_path / "corpus")
    llama, qwen = small_world.encoders
    apart = llama.model_copy(
        update={"name": "apart", "layer": -3, "layers": (1, 2, -1), "join": "separate"}
    )
    run_embed(str(corpus), apart, PoolSettings())
    recipe = small_world.recipe(
        tmp_path / "straight",
        corpus=str(corpus),  # type: ignore[arg-type]
        encoders=[apart.model_dump(mode="json"), qwen.model_dump(mode="json")],  # type: ignore[arg-type]
        model={"layers": "per_block"},
        train={"sample_prompts": ["a red circle"]},
    )
    straight = train(recipe)
    weights = load_file(straight.model / FINAL)
    (scores,) = (value for name, value in weights.items() if name.endswith("mixture.scores"))
    assert scores.shape == (3, 3)
    assert scores.abs().min() > 0

    # As a kill between the two checkpoints leaves a run.
    torn = tmp_path / "torn" / recipe.name
    torn.mkdir(parents=True)
    kept = checkpoints.checkpoint_name(4)
    shutil.copytree(recipe.run_folder / kept, torn / kept)
    shutil.copy(recipe.run_folder / "run.json", torn)
    resumed = train(recipe.model_copy(update={"output": str(tmp_path / "torn")}))
    for name, value in load_file(resumed.model / FINAL).items():
        assert torch.equal(value, weights[name]), name
    pipe = LIDiTPipeline.from_pretrained(resumed.model)
    assert pipe(["a red circle"], seed=[1], output_type="np").images.shape == (1, 32, 32, 3)

    one = recipe.model_copy(update={"model": recipe.model.model_copy(update={"layers": "one"})})
    with pytest.raises(
        InputError, match="'one' reads one state per token, but encoder apart keeps 3 layers apart"
    ):
        run_facts(one, Corpus.open(corpus))
