"""The Swiss roll's picture: forward and reverse trajectories side by side, the drift between them,
energy distances below.

Knows a denoiser over (B, 2) and the measured tables; writes one PNG. Uses matplotlib's Figure
alone, so no state is shared.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor

from training.diffusion.noise import generators, noise
from training.diffusion.process import Denoise, Schedule, posterior_coefficients, split
from training.diffusion.samplers import ancestral, ddim

TIMES = (0, 100, 250, 450, 700, 1000)  # of the cosine schedule's 1000
LIMIT = 2.7
INK, FAINT, BOX = "#22252b", "#8a909b", "#e4e6ea"
LINE_COLOURS = ("#7a5195", "#ef5675", "#ffa600", "#2f7ebc")
COLOURS, NEAREST, FARTHEST = "turbo", 0.6, 2.1  # colour of a point by its distance from the middle


def draw(
    path: Path,
    denoise: Denoise,
    schedule: Schedule,
    data: Tensor,
    by_rate: list[dict[str, Any]],
    by_steps: dict[str, dict[int, float]],
    chance: float,
    seed: int,
    facts: Mapping[str, Any],
) -> None:
    """Draw the roll's processes and measurements; data (N, 2) are the points shown, `chance` the
    energy distance of data to data.

    `facts` become text in the PNG.
    """
    layout = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.04, hspace=0.02, wspace=0.02)
    figure = Figure(figsize=(15, 11.7), dpi=110, facecolor="white", layout=layout)
    above, below = np.asarray(figure.subfigures(2, 1, height_ratios=[3, 1.45]))
    panels = above.subplots(3, len(TIMES))
    point_generators = generators(range(seed, seed + len(data)))
    eps = noise(data.shape, point_generators)
    reverse = reverse_trajectory(denoise, schedule, eps, point_generators)
    for column, t in enumerate(TIMES):
        panels[0, column].set_title("data, t = 0" if t == 0 else f"t = {t}", color=INK, fontsize=13)
        _points(
            panels[0, column],
            schedule.q_sample(data, torch.full((len(data),), t), eps),
            radius(data),
        )
        _points(panels[1, column], reverse[t], radius(reverse[0]))
        _drift(panels[2, column], denoise, schedule, max(t, 20), data)
    panels[2, 0].text(
        0.04,
        0.04,
        "t = 20",
        transform=panels[2, 0].transAxes,
        color=INK,
        fontsize=10,
        backgroundcolor="white",
        zorder=5,
    )
    for row, name in enumerate(
        (
            r"forward  $q(x_t\,|\,x_0)$  " "\u2192",
            "\u2190" r"  reverse  $p(x_{t-1}\,|\,x_t)$",
            "drift  $E[x_{t-1}] - x_t$",
        )
    ):
        panels[row, 0].set_ylabel(name, color=INK, fontsize=13)
    flow, left, right = below.subplots(1, 3, width_ratios=[1, 1.15, 1.15])
    _flow(flow, denoise, schedule, eps[:160], data)
    _by_rate(left, by_rate, chance)
    _by_steps(right, by_steps, chance)
    figure.savefig(path, metadata={name: str(value) for name, value in facts.items()})


def radius(points: Tensor) -> np.ndarray:
    """Distance from the middle, which tells the place along the roll and so gives a point its
    colour.
    """
    return points.norm(dim=1).numpy()


def reverse_trajectory(
    denoise: Denoise, schedule: Schedule, x_T: Tensor, point_generators: list[torch.Generator]
) -> dict[int, Tensor]:
    """Sample by Algorithm 2 in 500 steps; returns x_t by t, the end at t = 0."""
    seen: dict[int, Tensor] = {}
    end = ancestral(
        denoise,
        x_T,
        schedule,
        500,
        generator=point_generators,
        callback=lambda step, t, x_t, x_0: seen.update({t: x_t.clone()}),
    )
    return seen | {0: end}


def _points(axes: Axes, points: Tensor, colour: np.ndarray) -> None:
    axes.scatter(
        points[:, 0],
        points[:, 1],
        c=colour,
        s=3.5,
        cmap=COLOURS,
        vmin=NEAREST,
        vmax=FARTHEST,
        linewidths=0,
    )
    _square(axes)


def _square(axes: Axes) -> None:
    axes.set(xlim=(-LIMIT, LIMIT), ylim=(-LIMIT, LIMIT), xticks=[], yticks=[], aspect="equal")
    for side in axes.spines.values():
        side.set_color(BOX)


def _drift(axes: Axes, denoise: Denoise, schedule: Schedule, t: int, data: Tensor) -> None:
    """Lines along the mean of the reverse step at x_t, broader and darker where it moves
    farther.
    """
    line = torch.linspace(-LIMIT, LIMIT, 61)
    x_t = torch.cartesian_prod(line, line)
    of_x_0, of_x_t, _ = posterior_coefficients(
        float(schedule.alpha_bar[t]), float(schedule.alpha_bar[t - 1])
    )
    with torch.no_grad():
        x_0, _ = split(denoise(x_t, torch.full((len(x_t),), t)))
    drift = (
        (of_x_0 * x_0 + of_x_t * x_t - x_t).numpy().reshape(61, 61, 2).transpose(1, 0, 2)
    )  # (y, x, 2)
    length = np.linalg.norm(drift, axis=2)
    share = np.minimum(length / np.quantile(length, 0.9), 1)
    axes.scatter(data[:, 0], data[:, 1], s=1.5, color=BOX, linewidths=0, zorder=0)
    axes.streamplot(
        line.numpy(),
        line.numpy(),
        drift[..., 0],
        drift[..., 1],
        color=share,
        cmap="viridis_r",
        linewidth=0.4 + 1.1 * share,
        density=1.1,
        arrowsize=0.8,
    )
    _square(axes)


def _flow(axes: Axes, denoise: Denoise, schedule: Schedule, x_T: Tensor, data: Tensor) -> None:
    """Paths of DDIM from the noise to the roll, each in the colour of its end."""
    path: list[Tensor] = []
    path.append(
        ddim(
            denoise, x_T, schedule, 200, callback=lambda step, t, x_t, x_0: path.append(x_t.clone())
        )
    )
    lines = torch.stack(path, dim=1).numpy()  # (N, steps + 1, 2)
    axes.add_collection(
        LineCollection(
            list(lines),
            array=radius(path[-1]),
            cmap=COLOURS,
            norm=Normalize(NEAREST, FARTHEST),
            linewidths=0.6,
            alpha=0.75,
        )
    )
    axes.scatter(lines[:, 0, 0], lines[:, 0, 1], s=5, color=FAINT, linewidths=0)
    axes.scatter(lines[:, -1, 0], lines[:, -1, 1], s=10, color=INK, linewidths=0, zorder=3)
    axes.set_title("DDIM carries noise (grey) to the roll (black)", color=INK, fontsize=11)
    _square(axes)


def _by_rate(axes: Axes, by_rate: list[dict[str, Any]], chance: float) -> None:
    positions = list(range(len(by_rate)))
    axes.plot(
        positions,
        [_label(row["energy_distance"], chance) for row in by_rate],
        color=LINE_COLOURS[3],
        marker="o",
    )
    axes.set_xticks(positions, [f"{row['rate']:g}\n{row['steps']}" for row in by_rate])
    _curve(
        axes, "by diffusion rate", "diffusion rate beta, and the steps it needs (ancestral)", chance
    )


def _by_steps(axes: Axes, by_steps: dict[str, dict[int, float]], chance: float) -> None:
    for (name, row), colour in zip(by_steps.items(), LINE_COLOURS, strict=True):
        labels = [_label(distance, chance) for distance in row.values()]
        axes.plot(
            [str(count) for count in row],
            labels,
            marker="o",
            markersize=4,
            label=name,
            color=colour,
        )
    _curve(axes, "by step count", "network calls (cosine schedule)", chance)
    axes.legend(frameon=False, fontsize=9)


def _label(distance: float, chance: float) -> float:
    return max(
        distance, chance / 3
    )  # the estimate falls to 0 and below by chance, where a logarithm cannot follow


def _curve(axes: Axes, title: str, x_label: str, chance: float) -> None:
    axes.set_yscale("log")
    axes.set_ylim(bottom=chance / 4)
    axes.axhspan(chance / 4, chance, color=BOX, alpha=0.6, linewidth=0)
    axes.text(
        0.02,
        chance * 0.9,
        "data to data",
        transform=axes.get_yaxis_transform(),
        color=FAINT,
        fontsize=9,
        va="top",
    )
    axes.set_title(f"energy distance {title}", color=INK, fontsize=11)
    axes.set_xlabel(x_label, color=INK)
    axes.grid(True, color=BOX, linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
