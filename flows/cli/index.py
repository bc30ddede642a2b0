"""The commands of a live index: `index RECIPE`, `add`, `merge`, `remove`, `compact` and `verify`.

Each command reads and writes ROOT through one function of `flows.live_index`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from flows.cli import run as run_command
from flows.cli.generate import check_files
from flows.cli.option_groups import option_groups
from flows.cli.options import DEFAULT_ROOT, Json, RootUri, RunName, print_json, say
from flows.config.roots import open_for
from flows.sources.caption_text import NotTextError, decode_text
from infra.errors import CallerError
from infra.storage.stage_files import pinned_copy
from infra.storage.store import Root

BUILD = "build"
MANY = 8
"""Number of additions from which `add` warns that queries are slow, since each is searched."""
MAX_LINES = 1_000_000
ALIKE_CANDIDATES = 64

Urls = Annotated[
    list[str] | None,
    typer.Option("--url", metavar="URL", help="The URL of the picture; may be repeated."),
]
Keys = Annotated[
    list[str] | None,
    typer.Option(
        "--key",
        metavar="KEY",
        help="The key that `unclip search --json` prints; may be repeated.",
    ),
]
Images = Annotated[
    list[Path] | None,
    typer.Option("--image", metavar="FILE", help="The picture, or a copy that looks like it."),
]
TextFile = Annotated[
    Path | None,
    typer.Option(
        "--text-file", metavar="FILE", help="A list with one URL, key or whole caption per line."
    ),
]


@dataclass(frozen=True)
class SampleOptions:
    """Options that select samples; a sample needs to match one of them."""

    urls: Urls = None
    keys: Keys = None
    images: Images = None
    text_file: TextFile = None


class WithBuild(TyperGroup):
    """A command group whose default command is `build`, as in `unclip index quickstart`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] != "--help":
            args = [BUILD, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=WithBuild,
    help="Build a run's index, add to it and remove from it.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.command(
    BUILD, help="Run the stage index, with what it needs; short form: `unclip index RECIPE`."
)(run_command.verb("index"))


@app.command()
def add(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER",
            help="Pictures with .txt captions, or an embed folder made by the run's CLIP.",
        ),
    ],
    licence: Annotated[
        str, typer.Option("--licence", metavar="NAME", help="Licence of the pictures.")
    ] = "",
    root: RootUri = DEFAULT_ROOT,
    run: RunName = None,
    as_json: Json = False,
) -> None:
    """Add pictures or embeddings to a run's index without rebuilding it.

    They are searched until CLIP is trained again.
    """
    if not folder.is_dir():
        raise CallerError(f"{folder}: there is no such folder")
    opened = open_for(root, for_writing=True)
    from flows.live_index.additions import add as add_folder
    from flows.live_index.lineage import open_view, warnings

    view, run_lineage = open_view(opened, run)
    for line in warnings(run_lineage):
        say(f"unclip: {line}")
    committed, reasons = add_folder(opened, run_lineage, view, folder, licence, say)
    result = {**reasons, "addition": committed.uri if committed else None}
    if as_json:
        print_json(result)
    else:
        print(", ".join(f"{name} {count:,}" for name, count in reasons.items()))
    if committed and len(run_lineage.additions) >= MANY:
        say(
            f"unclip: a query searches {len(run_lineage.additions) + 1} additions, "
            "one after another: `unclip index merge` makes one of them"
        )


@app.command()
def merge(root: RootUri = DEFAULT_ROOT, run: RunName = None, as_json: Json = False) -> None:
    """Merge all additions to a run's index into one, so that queries are faster."""
    opened = open_for(root, for_writing=True)
    from flows.live_index.merge import merge as merge_additions

    merged, count = merge_additions(opened, run, say)
    if as_json:
        print_json({"merged": count if merged else 0, "addition": merged.uri if merged else None})
    elif merged:
        print(
            f"{count} additions, {merged.manifest['counts']['out']:,} samples, are one: "
            f"{merged.stage}/{merged.key}"
        )
    else:
        print(f"nothing to merge: {'one addition' if count else 'no additions'}")


@app.command()
@option_groups
def remove(
    selection: SampleOptions = SampleOptions(),
    missing_ok: Annotated[
        bool,
        typer.Option(
            "--missing-ok",
            help="Remove the rest where a URL, key, image or line matches no sample; "
            "URLs are logged, so that later runs do not use them.",
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be removed, and remove nothing.")
    ] = False,
    root: RootUri = DEFAULT_ROOT,
    run: RunName = None,
    as_json: Json = False,
) -> None:
    """Take samples down: log them, and exclude them from all later queries and runs.

    Ends with 2 and removes nothing where an entry matches no sample, unless --missing-ok is given.
    """
    opened = open_for(root, for_writing=not dry_run)
    from flows.live_index import takedown
    from infra.canonical_url import canonical_origin

    rows, urls, unmatched = _meant(opened, run, selection)
    if unmatched and not missing_ok:
        raise _unmatched_error(unmatched)
    request = {
        "urls": [canonical_origin(url) for url in selection.urls or []],
        "keys": selection.keys or [],
        "images": [file.name for file in selection.images or []],
        "list": selection.text_file.name if selection.text_file else "",
    }
    trained = []
    if not dry_run:
        entry = takedown.take_down(opened, rows, request, urls)
        trained = [f"{model['stage']}/{model['key']}" for model in entry["trained_into"]]
    result = {
        "removed": sorted({row["key"] for row in rows}),
        "urls": sorted({*(row["origin"] for row in rows), *urls}),
        "trained_into": trained,
    }
    if as_json:
        print_json(result)
    else:
        _print_removed(result, dry_run)


def _unmatched_error(unmatched: list[str]) -> CallerError:
    from infra.canonical_url import without_user

    others = f" and {len(unmatched) - 3} more" if len(unmatched) > 3 else ""
    names = ", ".join(repr(without_user(entry)) for entry in unmatched[:3])
    return CallerError(
        f"no sample in ROOT matches {names}{others}: nothing was "
        "removed; look it up with `unclip search --json`, or give --missing-ok"
    )


def _print_removed(result: dict[str, list[str]], dry_run: bool) -> None:
    print(
        f"{'would remove' if dry_run else 'removed'} {len(result['removed']):,}: "
        f"{', '.join(result['removed'][:10])}"
    )
    if trained := result["trained_into"]:
        print(
            f"trained into {', '.join(trained)}: the next `unclip run` trains them again without it"
        )


@app.command()
def compact(root: RootUri = DEFAULT_ROOT, as_json: Json = False) -> None:
    """Delete the data of removed samples from all folders; `unclip run` does so by itself."""
    opened = open_for(root, for_writing=True)
    from flows.live_index.compaction import compact as compact_root

    removed = compact_root(opened, say)
    if as_json:
        print_json({"rows": removed})
        return
    for name, count in removed.items():
        print(f"{name}  {count:,} rows")
    if not removed:
        print("nothing to compact: no removed sample is left")


@app.command()
@option_groups
def verify(
    selection: SampleOptions = SampleOptions(),
    root: RootUri = DEFAULT_ROOT,
    run: RunName = None,
    as_json: Json = False,
) -> None:
    """Show which files in ROOT still hold samples, and which models were trained on them."""
    opened = open_for(root, for_writing=False)
    from flows.live_index import takedown

    rows, urls, _ = _meant(opened, run, selection)
    named_rows = [
        *rows,
        *({"key": named_key, "origin": "", "sha256": ""} for named_key in selection.keys or []),
    ]
    result = takedown.verify(opened, named_rows, urls)
    if as_json:
        print_json(result)
        return
    for kind, folders in result["found_in"].items():
        print(f"{kind:<11} {', '.join(folders) or 'not found'}")
    for path in result["leftovers"]:
        print(f"left in     {path}")
    for path in result["unreadable"]:
        print(f"unreadable  {path}: it was cut short, and may hold it")
    print(f"trained into {', '.join(result['trained_into']) or 'no model that is there'}")


def _meant(
    root: Root, run: str | None, selection: SampleOptions
) -> tuple[list[dict[str, Any]], list[str], list[str]]:
    """Return the samples that the options select, all selected URLs in canonical form, and the
    entries that select nothing.

    The URLs include those without a sample in ROOT. An entry that is in the removal log is not
    reported again. Raises CallerError if no option is set.
    """
    keys, images, text_file = selection.keys, selection.images, selection.text_file
    if not (selection.urls or keys or images or text_file):
        raise CallerError("name the samples: --url, --key, --image or --text-file")
    from flows.live_index.takedown import by_values, find
    from infra.canonical_url import canonical_origin
    from infra.storage.removal_log import read_removals

    lines = _lines(text_file) if text_file else []
    origins = {entry: canonical_origin(entry) for entry in (*(selection.urls or []), *lines)}
    all_urls = sorted({origin for origin in origins.values() if "://" in origin})
    matched: set[str] = set()
    rows = find(root, by_values("origin", origins.values(), matched)) if origins else []
    all_keys = [*(keys or []), *lines]
    if all_keys:
        rows += find(root, by_values("key", all_keys, matched))
    unmatched = []
    for file in images or []:
        alike = _alike(root, run, file)
        rows += alike
        unmatched += [] if alike else [str(file)]
    if lines:
        rows += _with_captions(root, run, lines, matched)
    removals = read_removals(root)
    matched |= removals.keys | removals.origins
    entries = {key: key for key in keys or []} | origins
    unmatched += [entry for entry, origin in entries.items() if not {entry, origin} & matched]
    return rows, all_urls, unmatched


def _with_captions(
    root: Root, run: str | None, captions: list[str], matched: set[str]
) -> list[dict[str, Any]]:
    """Return the samples of a run's index with one of these captions; add those to `matched`."""
    import pyarrow as pa
    import pyarrow.compute as pc

    from flows.live_index.lineage import open_view

    view, _ = open_view(root, run)
    rows: list[dict[str, Any]] = []
    for segment in view.segments:
        column = segment.index.column("caption")
        is_meant = pc.is_in(column, pa.array(captions, pa.string()))
        matched.update(pc.unique(column.filter(is_meant)).to_pylist())
        rows += segment.index.metadata(pc.indices_nonzero(is_meant).to_numpy())
    return rows


def _lines(file: Path) -> list[str]:
    check_files([file], "--text-file")
    try:
        text = decode_text(file.read_bytes())
    except NotTextError as error:
        raise CallerError(f"--text-file {file}: {error}: save it as UTF-8") from None
    lines = [line.strip() for line in text.splitlines()]
    if len(lines) > MAX_LINES:
        raise CallerError(f"--text-file {file} has more than {MAX_LINES:,} lines: divide it")
    return [line for line in lines if line and not line.startswith("#")]


def _alike(root: Root, run: str | None, file: Path) -> list[dict[str, Any]]:
    """Return the samples of a run's index that look like an image file.

    Candidates are CLIP's nearest neighbours; a perceptual hash decides.
    """
    check_files([file], "--image")
    from flows.live_index.lineage import open_view
    from indexing.data.images import read_picture
    from indexing.dedup.grouping import hash_picture, is_alike
    from training.data.image_reader import read_file
    from training.jobs import embed

    view, run_lineage = open_view(root, run)
    side_px = 64
    picture_hash = hash_picture(read_file(file, side_px))
    hits = view.search(
        embed.embed_images(pinned_copy(run_lineage.clip.files), [file])[0], ALIKE_CANDIDATES
    )
    pictured = [hit for hit in hits if hit.facts["shard"]]
    return [
        hit.facts
        for hit in pictured
        if is_alike(
            picture_hash,
            hash_picture(read_picture(hit.facts, view.segments[hit.segment].shards, side_px)),
        )
    ]
