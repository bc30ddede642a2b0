"""The report's section on the diffusion process, shown on the two-dimensional Swiss roll.

Trains a small network in seconds, with the same schedules, losses and samplers as the run's models.
Writes one PNG file.
"""

from pathlib import Path

from indexing.evaluation.evaluate import EvaluateConfig
from indexing.report import sections
from training.diffusion import swiss_roll as roll

TITLE = "The diffusion process: the Swiss roll"


def section(config: EvaluateConfig, out: Path) -> sections.ReportSection:
    """Train on the roll and sample it with several diffusion rates, samplers and step counts.

    Writes `out`/pictures/swiss_roll.png.
    """
    figures = roll.swiss_roll(out / "pictures", config.swiss_roll_steps, seed=config.seed)
    chance = f"data to other data, by chance alone: {figures['data_to_data']:.4f}"
    caption = (
        f"Data to noise, noise to data, and the drift that leads back; {figures['steps']:,} "
        "training steps of a small network, "
        f"seed {config.seed}. Below: energy distance of samples to data by diffusion rate and by "
        "step count."
    )
    by_rate = sections.table(
        f"Energy distance by diffusion rate, ancestral sampling ({chance}); a high rate is a map "
        "in one step, a low one slow to sample",
        ["Rate", "Steps", "Energy distance"],
        [
            [f"{row['rate']:g}", f"{row['steps']:,}", row["energy_distance"]]
            for row in figures["by_rate"]
        ],
    )
    counts = list(next(iter(figures["by_steps"].values())))
    by_steps = sections.table(
        f"Energy distance by step count, cosine schedule ({chance})",
        ["Sampler", *(str(count) for count in counts)],
        [[name, *(row[count] for count in counts)] for name, row in figures["by_steps"].items()],
    )
    alt = (
        "The Swiss roll's forward and reverse trajectories, its drift field, and energy distances "
        "by rate and by steps"
    )
    return sections.section(
        TITLE, [], [by_rate, by_steps], [sections.picture("pictures/swiss_roll.png", alt, caption)]
    )
