"""The command `search`: search the live index of a run by text, image or key.

Reads ROOT and writes nothing.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.generate import check_files, spoken
from flows.cli.options import DEFAULT_ROOT, Json, RootUri, RunName, print_json
from flows.config.roots import open_for
from infra.errors import CallerError
from infra.storage.stage_files import pinned_copy

if TYPE_CHECKING:
    import numpy as np

    from indexing.ann.view import View


def search(
    text: Annotated[
        str | None, typer.Argument(metavar="TEXT", help="What the pictures should show.")
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option("--image", metavar="FILE", help="Search with a picture instead of a text."),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(
            "--key", metavar="KEY", help="Search for pictures like the one with this key."
        ),
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, max=1000, help="How many results.")] = 10,
    root: RootUri = DEFAULT_ROOT,
    run: RunName = None,
    as_json: Json = False,
) -> None:
    """Search the pictures of a run by text, by a picture file or by one of its pictures."""
    if sum(value is not None for value in (text, image, key)) != 1:
        raise CallerError(
            "search needs a text, --image FILE or --key KEY, one of them: "
            'unclip search "a red heart"'
        )
    if text is not None:
        text = spoken("search", text)
    check_files([image] if image else [], "--image")
    from flows.live_index.lineage import open_view

    view, run_lineage = open_view(open_for(root, for_writing=False), run)
    if key is not None:
        query, without = _vector_of(view, key)
    else:
        query, without = _embed(pinned_copy(run_lineage.clip.files), text, image), frozenset[str]()
    results = [
        {
            "key": hit.facts["key"],
            "score": round(hit.score, 4),
            "caption": hit.facts["caption"],
            "url": hit.facts["origin"],
        }
        for hit in view.search(query, k, without=without)
    ]
    if as_json:
        print_json(results)
        return
    for result in results:
        print(f"{result['score']:.3f}  {result['caption']}  {result['url']}")


def _vector_of(view: "View", key: str) -> "tuple[np.ndarray, frozenset[str]]":
    """Return the image vector of a sample, and its sha256 to exclude it from the results."""
    hit = view.find_key(key)
    if hit is None:
        raise CallerError(
            f"no sample in the index has the key {key!r}: `unclip search --json` prints keys"
        )
    return view.vector(hit), frozenset({hit.facts["sha256"]})


def _embed(clip: Path, text: str | None, image: Path | None) -> "np.ndarray":
    """Return the query vector of an image file or, without one, of a text."""
    from training.jobs import embed

    if image is not None:
        return embed.embed_images(clip, [image])[0]
    return embed.embed_texts(clip, [text or ""])[0]
