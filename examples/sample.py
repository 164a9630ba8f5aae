"""Pictures from a trained model: one prompt, several guidance scales, several seeds.

python examples/sample.py runs/demo/model "a red circle left of a blue square" --out guidance.png
"""

import argparse
from pathlib import Path

import torch

from lidit import LIDiTPipeline
from lidit.grids import labelled_grid


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="model folder written by lidit train, or a hub id")
    parser.add_argument("prompt")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 2.0, 4.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("guidance.png"))
    arguments = parser.parse_args()

    pipe = LIDiTPipeline.from_pretrained(arguments.model).to(
        "cuda" if torch.cuda.is_available() else "cpu"
    )

    # The LLMs read the prompt once. Their states serve every call below, and the LLMs' memory is
    # free again.
    states = pipe.encode_prompts([arguments.prompt] * len(arguments.seeds))
    pipe.unload_encoders()

    images, labels = [], []
    for scale in arguments.scales:
        images += pipe(prompt_embeds=states, guidance_scale=scale, seed=arguments.seeds).images
        labels += [f"guidance {scale:g}, seed {seed}" for seed in arguments.seeds]
    labelled_grid(images, labels, columns=len(arguments.seeds)).save(arguments.out)
    print(f"{arguments.out}: {len(images)} images of {arguments.prompt!r}")


if __name__ == "__main__":
    main()
