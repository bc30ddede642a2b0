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
    if sum(query_part is not None for query_part in (text, image, key)) != 1:
        raise CallerError(
            'search needs a text, --image FILE or --key KEY, one of them: unclip search "a red heart"'
        )
    if text is not None and not text.strip():
        raise CallerError("search: the text is empty")
    check_files([image] if image else [], "--image")
    from flows.live_index.lineage import open_view
    from training.jobs import embed

    view, run_lineage = open_view(open_for(root, for_writing=False), run)
    without: frozenset[str] = frozenset()
    if key is not None:
        row = view.find_key(key)
        if row is None:
            raise CallerError(
                f"no sample in the index has the key {key!r}: `unclip search --json` prints keys"
            )
        query, without = view.vector(row), frozenset({row.facts["sha256"]})
    elif image is not None:
        query = embed.embed_images(run_lineage.clip.local(), [image])[0]
    else:
        query = embed.embed_texts(run_lineage.clip.local(), [spoken("search", text or "")])[0]
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
