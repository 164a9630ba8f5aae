"""LI-DiT in a training loop of your own: plain PyTorch, no Ray, no DeepSpeed, no recipe.

    python examples/own_training_loop.py corpus --out weights --steps 1000 --patch-size 2

The corpus gives whole batches: latents, noise, timesteps and the captions' states. Batch number n
is the same in every run, so a loop that saves its step and its weights resumes exactly.
"""

import argparse
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from lidit import Corpus, DataSettings, FeedDataset, LIDiT, open_feed
from lidit.config import ModelSettings, ObjectiveSettings
from lidit.data.families import Families
from lidit.diffusion import build_objective


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "corpus", help="folder or URL, with at least one text family and one latents family"
    )
    parser.add_argument("--out", type=Path, default=Path("weights"))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument(
        "--patch-size", type=int, default=2, help="must divide the sides of the latents"
    )
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    # One process reads all of each batch; with torch.distributed, give every process its rank and
    # world_size.
    corpus, settings = Corpus.open(arguments.corpus), DataSettings(seed=0)
    families = Families.open(corpus, settings)
    feed = open_feed(corpus, settings, batch_size=arguments.batch_size, families=families)

    # The model normalises each LLM's states with the mean and deviation that its family has
    # measured.
    torch.manual_seed(0)
    shape = ModelSettings(width=64, depth=4, heads=4, patch_size=arguments.patch_size)
    model = LIDiT.from_settings(shape, families.widths, channels=families.latent_shape[0])
    for name, family in families.texts.items():
        shared = family.shared()
        model.conditioner.set_statistics(name, shared.mean, shared.deviation)
    model = model.to(device).train()

    # The objective decides what the model predicts: here a straight line from data to noise
    # (rectified flow).
    objective = build_objective(ObjectiveSettings(kind="rectified_flow"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for batch in DataLoader(FeedDataset(feed, stop=arguments.steps), batch_size=None):
        batch = batch.to(device)
        t = objective.timesteps(batch.u)  # [B]
        noisy = objective.add_noise(batch.latents, batch.noise, t)  # [B, C, H, W]
        prediction = model(noisy, t, batch.text)
        loss = objective.loss(prediction, batch.latents, batch.noise, t, noisy).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if batch.step % 10 == 0 or batch.step + 1 == arguments.steps:
            print(f"step {batch.step}: loss {loss.item():.4f}")

    # LIDiT.load(out) reads it back.
    model.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
