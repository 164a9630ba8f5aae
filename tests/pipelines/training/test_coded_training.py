"""Training on coded states: a resumed run is the undisturbed one to the last bit, and sees what its
states say.
"""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lidit.text.local import embed_here
from pipelines.training.train import train
from tests.helpers.killing import kill_a_worker_after
from tests.helpers.trained import SmallWorld

FINAL = "model/diffusion_pytorch_model.safetensors"


@pytest.mark.slow
def test_training_on_coded_states_resumes_to_the_last_bit(
    small_world: SmallWorld, tmp_path: Path
) -> None:
    shutil.copytree(small_world.corpus, tmp_path / "corpus")
    shutil.rmtree(tmp_path / "corpus" / "text")
    encoders = [
        e.model_copy(update={"storage": "coded", "storage_error": 0.2})
        for e in small_world.encoders
    ]
    for encoder in encoders:
        embed_here(str(tmp_path / "corpus"), encoder)
    changes = {
        "encoders": [e.model_dump(mode="json") for e in encoders],
        "corpus": str(tmp_path / "corpus"),
    }
    data = {"validation_fraction": 0.2}
    train_settings = {
        "validate_every": 4,
        "validation_samples": 12,
        "sample_prompts": ["a red circle"],
    }
    straight = small_world.recipe(tmp_path / "straight", **changes, data=data, train=train_settings)
    done = train(straight)

    killed = straight.model_copy(update={"output": str(tmp_path / "killed")})
    pids: list[int] = []
    hunter = kill_a_worker_after(killed.run_folder, 4, pids)
    again = train(killed)
    hunter.join()
    assert pids, "nothing was killed"
    one, other = (load_file(result.model / FINAL) for result in (done, again))
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
