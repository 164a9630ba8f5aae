"""Captions to LLM states, without a corpus and without training.

    python examples/encode_captions.py "a red circle" "a blue square left of a star" --encoder
    smollm2 --out states

`--encoder` takes the name of an encoder that ships with the package, or a YAML file with the keys
of EncoderSettings.
"""

import argparse
from pathlib import Path

from safetensors.torch import save_file

from lidit import load_encoder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("captions", nargs="+")
    parser.add_argument("--encoder", default="smollm2")
    parser.add_argument("--out", type=Path, help="folder for states.safetensors")
    arguments = parser.parse_args()

    # Only the blocks that the setting `layer` asks for are loaded. The instruction before the
    # caption runs once, here.
    encoder = load_encoder(arguments.encoder)
    spec = encoder.spec
    print(
        f"{spec.model_type}: block {spec.blocks} of {spec.total_blocks}, width {spec.width}, "
        f"{spec.dtype}"
    )
    _, prefix = encoder.prefix_states()  # [P, W]
    print(f"instruction: {len(prefix)} tokens, the same states for every caption")

    # Captions of any length together; each has states [T, W] of its own tokens, without padding.
    encoded = encoder.encode(arguments.captions)
    for text, caption in zip(arguments.captions, encoded, strict=True):
        cut = ", cut" if caption.truncated else ""
        print(f"{list(caption.states.shape)}{cut}: {text}")

    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        tensors = {
            str(number): caption.states.contiguous() for number, caption in enumerate(encoded)
        }
        save_file({"prefix": prefix.contiguous(), **tensors}, arguments.out / "states.safetensors")


if __name__ == "__main__":
    main()
