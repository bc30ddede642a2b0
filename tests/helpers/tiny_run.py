"""The tiny recipe's pictures, and the real command line over it in a process of its own."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 160, 60),
    "blue": (40, 60, 220),
    "yellow": (240, 200, 20),
    "black": (20, 20, 20),
}
SHAPES = {
    "disc": [
        (32 + round(22 * np.cos(turn)), 32 + round(22 * np.sin(turn)))
        for turn in np.linspace(0, 2 * np.pi, 24)
    ],
    "square": [(12, 12), (52, 12), (52, 52), (12, 52)],
    "triangle": [(32, 10), (54, 52), (10, 52)],
    "cross": [
        (26, 8),
        (38, 8),
        (38, 26),
        (56, 26),
        (56, 38),
        (38, 38),
        (38, 56),
        (26, 56),
        (26, 38),
        (8, 38),
        (8, 26),
        (26, 26),
    ],
}
SIZES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
RECIPE = Path(__file__).parent / "tiny.toml"
LIMIT_S = 900
"""Against a hang. It takes one or two minutes, longer where others work as well."""
PERSONS: dict[str, Any] = {
    "start_new_session": True,
    "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
}
"""For Popen, to start a process as a terminal does: leader of its group, with a Ctrl-C that a
shell's background jobs have ignored.
"""
KEPT: dict[str, str] = {}
"""Variables of the kinds that are otherwise kept from the command line."""


def draw(folder: Path) -> int:
    """Draw every shape in every colour and size, filled and as an outline, each beside its caption;
    return how many.
    """
    drawn = 0
    for style, (colour, rgb), (shape, corners), size in itertools.product(
        ("filled", "outline"), COLOURS.items(), SHAPES.items(), SIZES
    ):
        image = np.full((64, 64, 3), 255, np.uint8)
        points = (32 + (np.array(corners) - 32) * size).round().astype(np.int32)
        cv2.fillPoly(image, [points], rgb[::-1]) if style == "filled" else cv2.polylines(
            image, [points], True, rgb[::-1], 4
        )
        into = folder / style
        into.mkdir(parents=True, exist_ok=True)
        name = f"{colour}-{shape}-{size}".replace(".", "_")
        cv2.imwrite(str(into / f"{name}.png"), image)
        (into / f"{name}.txt").write_text(f"a {colour} {shape}\n")
        drawn += 1
    return drawn


def prepare(folder: Path) -> int:
    """Put the recipe and its pictures into a folder; return how many."""
    shutil.copy(RECIPE, folder)
    return draw(folder / "pictures")


def start(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    """Start `unclip` there as a person would, leader of its own process group."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PREFECT_", "UNCLIP_SCRATCH", "UNCLIP_ROOT", "RAY_"))
    }
    return subprocess.Popen(
        [sys.executable, "-m", "flows.cli.main", *arguments],
        cwd=folder,
        env=environment
        | {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "NO_ALBUMENTATIONS_UPDATE": "1"}
        | KEPT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **PERSONS,
    )


def ran(folder: Path, *arguments: str) -> tuple[int, str, str]:
    """Run `unclip` to its end; return exit code, stdout and stderr."""
    process = start(folder, *arguments)
    try:
        out, err = process.communicate(timeout=LIMIT_S)
    finally:
        process.kill()
    return process.returncode, out, err
