"""The commands that use what a run made: `search` and `generate`; and what the other such commands share with them.

They resolve a run through `ROOT/runs/`, by default the one that finished last.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.options import DEFAULT_ROOT, Json, RootUri, open_for, print_json
from infra.errors import CallerError
from infra.manifests import Committed
from infra.storage import Root

if TYPE_CHECKING:
    from training.generate import Unclip

RunName = Annotated[str | None, typer.Option("--run", metavar="NAME", help="Which run's models and index; by default the last one's.")]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**31, help="The same seed gives the same pictures.")]
Guidance = Annotated[float | None, typer.Option("--guidance", min=0, max=50, help="Strength of the guidance; by default the recipe's.")]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the grid and the pictures go.")]


def load_system(opened: Root, run: str | None, more: tuple[str, ...] = ()) -> "tuple[Unclip, dict[str, Any], dict[str, Committed]]":
    """Return a run's models, its record, and the folders of their stages and of `more`."""
    from flows.runs import committed_of, find_run

    record = find_run(opened, run)
    stages = {stage: committed_of(opened, record, stage) for stage in ("clip", "prior", "decoder", *more)}
    from training.generate import Unclip

    return Unclip.load(stages["clip"].local(), stages["prior"].local(), stages["decoder"].local()), record, stages


def spoken(command: str, text: str) -> str:
    """Return a text of the command line, which may hold bytes that are no text. Raises CallerError where it says nothing."""
    if not text.strip():
        raise CallerError(f"{command}: a caption or prompt is empty")
    return text.encode("utf-8", "replace").decode()


def search(
    text: Annotated[str | None, typer.Argument(metavar="TEXT", help="What the pictures should show.")] = None,
    image: Annotated[Path | None, typer.Option("--image", metavar="FILE", help="Search with a picture instead of a text.")] = None,
    k: Annotated[int, typer.Option("-k", min=1, max=1000, help="How many results.")] = 10,
    root: RootUri = DEFAULT_ROOT,
    run: RunName = None,
    as_json: Json = False,
) -> None:
    """Search the pictures of a run by text or by picture."""
    if (text is None) == (image is None):
        raise CallerError('search needs a text or --image FILE, one of them: unclip search "a red heart"')
    if text is not None and not text.strip():
        raise CallerError("search: the text is empty")
    if image is not None and not image.is_file():
        raise CallerError(f"--image {image}: there is no such file")
    from flows.runs import committed_of, find_run

    opened = open_for(root, for_writing=False)
    record = find_run(opened, run)
    index_folder, clip_folder = committed_of(opened, record, "index").local(), committed_of(opened, record, "clip").local()
    from indexing.index import Index
    from indexing.search import search as nearest
    from training import embed

    query = embed.embed_images(clip_folder, [image]) if image is not None else embed.embed_texts(clip_folder, [text or ""])
    found = nearest(Index.open(index_folder), query, k)
    if as_json:
        print_json([each | {"score": round(each["score"], 4)} for each in found])
        return
    for each in found:
        print(f"{each['score']:.3f}  {each['caption']}  {each['url']}")


def generate(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="What to draw; each prompt is one row of the grid.")],
    count: Annotated[int, typer.Option("--count", min=1, max=256, help="Pictures of each prompt.")] = 4,
    seed: Seed = 0,
    steps: Annotated[int | None, typer.Option("--steps", min=1, max=1000, help="Denoising steps; by default the recipe's.")] = None,
    guidance: Guidance = None,
    out: Out = Path("out"),
    root: RootUri = DEFAULT_ROOT,
    run: RunName = None,
    as_json: Json = False,
) -> None:
    """Draw pictures from text: one grid, and every picture as a PNG that knows its prompt, seed and settings."""
    prompts = [spoken("generate", prompt) for prompt in prompts]
    model, record, stages = load_system(open_for(root, for_writing=False), run)
    images = model.generate(prompts, count, seed, steps, guidance)
    settings = {
        "run": record["name"],
        "steps": steps,
        "guidance": guidance,
        "count": count,
        **{stage: committed.key for stage, committed in stages.items()},
    }
    from flows.png import write_pictures

    files, grid = write_pictures(images, prompts, seed, settings, out)
    if as_json:
        print_json({"seed": seed, "settings": settings, "files": [str(file) for file in files], "grid": str(grid)})
        return
    print(f"{grid}  ({len(files)} pictures beside it)")
