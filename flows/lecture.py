"""The commands `unclip diffusion …`: diffusion on data small enough to see whole, apart from any run.

They need no ROOT and no recipe, and write into the folder that they are given only.
"""

from pathlib import Path
from typing import Annotated

import typer

from flows.options import Json, print_json


def swiss_roll(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the picture goes.")] = Path("out"),
    steps: Annotated[int, typer.Option("--steps", min=1, max=1_000_000, help="Training steps.")] = 4000,
    seed: Annotated[int, typer.Option("--seed", min=0, help="The same seed gives the same figures.")] = 0,
    as_json: Json = False,
) -> None:
    """Learn the two-dimensional Swiss roll, sample it at several diffusion rates and step counts, and draw both."""
    from training import swiss_roll as roll

    result = roll.swiss_roll(out, steps, seed=seed)
    if as_json:
        print_json(result)
        return
    print(f"energy distance  {result['energy_distance']:9.5f}   to fresh data, DPM-Solver++ in 50 steps")
    print(f"data to data     {result['data_to_data']:9.5f}   what chance makes of it")
    print(f"training         {result['seconds']:9.1f} s {result['steps']:,} steps")
    for row in result["by_rate"]:
        print(f"rate {row['rate']:<12g}{row['energy_distance']:9.5f}   ancestral, {row['steps']:,} steps")
    print(f"picture          {result['picture']}")
