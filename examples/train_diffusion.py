"""Train a diffusion model in seconds: `python examples/train_diffusion.py OUT [STEPS]`.

The model learns the two-dimensional Swiss roll. Prints the energy distance between its samples and
fresh data for several step counts, and writes a picture of the forward and reverse trajectories.
"""

import sys
from pathlib import Path

from training.diffusion.swiss_roll import swiss_roll


def main(out: Path, steps: int) -> None:
    """Train, sample and draw."""
    out.mkdir(parents=True, exist_ok=True)
    figures = swiss_roll(out, steps, seed=0)
    distance, by_chance = figures["energy_distance"], figures["data_to_data"]
    print(f"energy distance {distance:.5f} (between two samples of data: {by_chance:.5f})")
    print(f"picture {figures['picture']}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 2_000)
