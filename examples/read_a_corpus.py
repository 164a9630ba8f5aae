"""What a corpus holds, and how its parts belong together: samples, captions, states, latents.

python examples/read_a_corpus.py corpus
"""

import argparse

from lidit import Corpus


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpus", help="folder or URL")
    corpus = Corpus.open(parser.parse_args().corpus)
    print(f"{corpus.folder.location}: {corpus.num_samples} samples in {corpus.num_units} units")

    # A family is everything that one LLM or one codec has computed. An unfinished family cannot be
    # read yet.
    texts = [
        corpus.text_family(handle.directory) for handle in corpus.text_families() if handle.complete
    ]
    latents = [
        corpus.latent_family(handle.directory)
        for handle in corpus.latent_families()
        if handle.complete
    ]

    # Row numbers are references: a sample names rows of its unit's captions, and the families have
    # the same rows.
    unit = 0
    sample = corpus.samples(unit).slice(0, 1).to_pylist()[0]
    texts_of_unit = corpus.captions(unit)["text"]
    print(
        f"\nsample {sample['key']}, {sample['width']} x {sample['height']} pixels, bucket "
        f"{sample['bucket']}"
    )
    for reference in sample["captions"]:
        row = reference["index"]
        print(f"  {reference['origin']}: {texts_of_unit[row].as_py()}")
        for family in texts:
            family.verify_unit(unit)  # the file's sha256 against its record, once
            # [T, W], a view of the file where the storage dtype allows
            (states,) = family.read(unit, [row])
            print(
                f"    {family.name}: states {list(states.shape)}, {family.spec['storage']} on disk"
            )
    for codec in latents:
        (latent,) = codec.read(unit, [0])  # [C, H, W] float32
        print(f"  {codec.name}: latents {list(latent.shape)}")


if __name__ == "__main__":
    main()
