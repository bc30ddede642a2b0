"""Add images or embeddings to a run's index without rebuilding it.

Images, with captions in .txt files beside them, are embedded by the run's CLIP; embeddings must
come from that CLIP. Writes ROOT/additions/<key>/: an embed folder, an index over it and, for
images, a shard for thumbnails. The key depends on the content, so adding the same folder twice does
nothing. After CLIP is trained again an addition is no longer searched (`unclip serve` and `unclip
index add` report this), and its images must be added again.
"""

import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from flows.ingest.http_fetch import FetchError, Rules, check_image
from flows.ingest.plain_image import to_plain
from flows.live_index.leftovers import remove_leftovers
from flows.live_index.lineage import ADDITIONS, Lineage, index_config
from flows.sources.caption_text import printable
from flows.sources.image_folder import Problem, captions_beside, image_files
from infra.canonical_url import canonical_column
from infra.errors import CallerError, DataError
from infra.schemas import EMBEDDED, STORED_SHA256, sample_key
from infra.storage import commits, manifests, stage_files
from infra.storage.manifest_schema import StageFacts
from infra.storage.manifests import Committed
from infra.storage.regular_files import read_regular, why_unsafe
from infra.storage.removal_log import Removals
from infra.storage.store import Root
from infra.storage.temporary_folders import writing_folder
from training.data.stored_image import pixels_of

if TYPE_CHECKING:
    from indexing.ann.view import View
    from training.sections.preprocessing import Look

STORED_PX = 256
BATCH = 256
LEAST_BYTES = 64 << 20
"""Minimum memory budget of an addition's index."""
MAX_NAMED = 20
"""Maximum files that are named when they are left out."""

Embedded = tuple[pa.Table, np.ndarray, np.ndarray]
"""Metadata of N samples, their image vectors (N, D) and their text vectors (N, D)."""


class UnreadError(Exception):
    """An image file that is left out, and why."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(": ".join(problem))
        self.problem = problem


class AdditionFacts(TypedDict, total=False):
    """The manifest fields that say where an addition comes from."""

    embeddings: bool
    merged_from: list[str]


def add(
    root: Root,
    run_lineage: Lineage,
    view: "View",
    source: Path,
    licence: str,
    say: Callable[[str], None] = print,
) -> tuple[Committed | None, dict[str, int]]:
    """Add a folder to a run's index; return the committed addition and the row counts by reason.

    The addition is None if no row is new. Samples whose key is in the index and samples that were
    taken down are left out, and files that do not read, whose names `say` is told. Raises
    CallerError for a folder without images and embeddings, or with embeddings of another CLIP, and
    DataError for embeddings that do not match their metadata.
    """
    remove_leftovers(root)
    with writing_folder(root.scratch, ADDITIONS) as out:
        if (source / "facts.json").is_file():
            rows, images, texts = read_embeddings(source, run_lineage)
            what: AdditionFacts = {"embeddings": True}
            unread: dict[str, int] = {}
        else:
            (rows, images, texts), unread = embed_pictures(source, run_lineage, licence, out, say)
            what = {"embeddings": False}
        is_new, reasons = new_rows(rows, view)
        reasons |= unread
        if not any(is_new):
            return None, reasons
        rows = rows.filter(pa.array(is_new))
        write_embed(out, rows, images[is_new], texts[is_new], run_lineage)
        whole = index_config(run_lineage.index)
        memory_bytes = share_of(whole.memory_bytes, len(rows), view)
        dropped = {name: count for name, count in reasons.items() if name != "added"}
        return commit(
            root, run_lineage, out, rows["key"].to_pylist(), memory_bytes, dropped, what
        ), reasons


def commit(
    root: Root,
    run_lineage: Lineage,
    out: Path,
    keys: list[str],
    memory_bytes: int,
    dropped: dict[str, int],
    what: AdditionFacts,
) -> Committed:
    """Build an index over the embed folder in `out` and commit both as one addition.

    `keys` are the samples' keys, `dropped` counts the dropped rows by reason, and `what` holds
    additional manifest fields.
    """
    started = manifests.now()
    from indexing.ann.index import build

    whole = index_config(run_lineage.index)
    section = whole.model_copy(update={"factory": "auto", "memory_bytes": memory_bytes})
    counts = build(section, out, out)
    counts["dropped"] = dropped
    key = hashlib.sha256("\n".join([run_lineage.fingerprint, *sorted(keys)]).encode()).hexdigest()[
        :16
    ]
    facts: StageFacts = {
        "stage_version": 1,
        "clip_digest": run_lineage.fingerprint,
        "sections": {"index": section.model_dump(mode="json")},
        "inputs": {},
        "input_digests": {},
        "counts": counts,
        "started": started,
        **what,
    }
    return commits.commit(root, ADDITIONS, key, out, facts)


def share_of(memory_bytes: int, count: int, view: "View") -> int:
    """Return the memory budget of an addition of `count` samples, in proportion to the whole.

    It is at least LEAST_BYTES and at most `memory_bytes`.
    """
    before = sum(segment.index.count for segment in view.segments)
    return min(memory_bytes, max(LEAST_BYTES, memory_bytes * count // (before + count)))


def read_embeddings(source: Path, run_lineage: Lineage) -> Embedded:
    """Read an embed folder made by the run's CLIP.

    Returns the metadata, the image vectors (N, D) and the text vectors (N, D). Raises CallerError
    if another CLIP made it.
    """
    for file in source.rglob("*"):
        if (file.is_symlink() or not file.is_dir()) and (fault := why_unsafe(file, source)):
            raise CallerError(f"{file} is {fault}: the folder must hold the files themselves")
    facts = json.loads((source / "facts.json").read_text())
    if facts.get("clip_digest", facts.get("clip_key")) not in (
        run_lineage.fingerprint,
        run_lineage.clip.key,
    ):
        raise CallerError(
            f"{source} was embedded by CLIP {facts.get('clip_digest', facts.get('clip_key'))}, "
            f"the index by {run_lineage.clip.key}: embed it with the run's own CLIP"
        )
    from indexing.data.embedding_store import open_parts, read_metadata

    count, dim = int(facts["count"]), int(facts["dim"])
    images, texts = (
        np.concatenate(open_parts(source / name, count, dim)) for name in ("img_emb", "text_emb")
    )
    table = read_metadata(source / "metadata", EMBEDDED.names, count).cast(EMBEDDED)
    # The shards are not copied: these samples can be found, but have no thumbnail.
    return (
        table.set_column(
            EMBEDDED.get_field_index("shard"), "shard", pa.array([""] * count, pa.string())
        ),
        images,
        texts,
    )


def embed_pictures(
    source: Path, run_lineage: Lineage, licence: str, out: Path, say: Callable[[str], None]
) -> tuple[Embedded, dict[str, int]]:
    """Embed the images below a folder with the captions beside them; write them as a shard.

    The shard is `out`/shards/00000.tar. Returns the metadata with the image vectors (N, D) and the
    text vectors (N, D), float16, and the counts of files that are left out by reason; `say` is told
    their names. Raises CallerError if no image is left.
    """
    files = list(image_files(source)) if source.is_dir() else []
    if not files:
        raise CallerError(
            f"{source} holds neither embeddings (facts.json, img_emb/, text_emb/, metadata/) "
            "nor images (PNG, JPEG, WebP, GIF, BMP, TIFF, AVIF)"
        )
    from training.jobs import embed

    with run_lineage.clip.files.local_copy() as clip:
        texts_of, images_of, side_px = embed.encoders(clip)
        look = embed.read_look(clip)
    (out / "shards").mkdir()
    rows: list[dict[str, Any]] = []
    images, texts = [], []
    problems: list[tuple[Path, Problem]] = []
    with tarfile.open(out / "shards" / "00000.tar", "w") as tar:
        for batch in (files[start : start + BATCH] for start in range(0, len(files), BATCH)):
            squares = []
            for file, problem in batch:
                try:
                    if problem:
                        raise UnreadError(problem)
                    square, row = read_one(file, side_px, look, licence, source)
                except UnreadError as error:
                    problems.append((file, error.problem))
                    continue
                rows.append(row | store(tar, f"{len(rows):08d}.png", row.pop("picture")))
                squares.append(square)
            if squares:
                images.append(images_of(np.stack(squares)))
                captions = [row["caption"] or "a picture" for row in rows[-len(squares) :]]
                texts.append(texts_of(captions))
    if not rows:
        first = _line_of(*problems[0])
        raise CallerError(f"none of {len(files)} images in {source} can be added: {first}")
    _report_left_out(problems, say)
    return (
        pa.Table.from_pylist(rows, EMBEDDED),
        np.concatenate(images).astype(np.float16),
        np.concatenate(texts).astype(np.float16),
    ), dict(Counter(reason for _, (reason, _) in problems))


def _line_of(file: Path, problem: Problem) -> str:
    return f"{printable(file)}: {': '.join(problem)}"


def _report_left_out(problems: list[tuple[Path, Problem]], say: Callable[[str], None]) -> None:
    for file, problem in problems[:MAX_NAMED]:
        say(f"left out {_line_of(file, problem)}")
    if len(problems) > MAX_NAMED:
        say(f"left out {len(problems) - MAX_NAMED:,} more")


def read_one(
    file: Path, side_px: int, look: "Look", licence: str, source: Path
) -> tuple[np.ndarray, dict[str, Any]]:
    """Return an image preprocessed for the encoder, and its row.

    The row's field "picture" holds the image to store, uint8 RGB, at most STORED_PX on a side.
    Raises UnreadError.
    """
    from training.data.image_reader import FILE_SIDE_PX, as_square

    pixels = read_pixels(file)
    height_px, width_px = pixels.shape[:2]
    longer_px = max(height_px, width_px)
    if longer_px > FILE_SIDE_PX:  # a thin one made square would need its side squared
        size = (max(1, side * FILE_SIDE_PX // longer_px) for side in (width_px, height_px))
        pixels = cv2.resize(pixels, tuple(size), interpolation=cv2.INTER_AREA)
    captions, problem = captions_beside(file, source)
    if problem:
        raise UnreadError(problem)
    caption = " ".join(" ".join(captions).split())[:2000]
    if not file.with_suffix(".txt").is_file():
        caption = printable(file.stem).replace("_", " ").replace("-", " ")
    name = printable(file.relative_to(source))
    origin = f"file:{name}#{stage_files.file_sha256(file)[:16]}"
    row = dict.fromkeys(EMBEDDED.names, "") | {
        "key": sample_key(origin, caption),
        "origin": origin,
        "caption": caption,
        "captions": [caption],
        "licence": licence,
        "split": "added",
        "width_px": width_px,
        "height_px": height_px,
        "picture": as_square(pixels, min(STORED_PX, longer_px)),
    }
    return as_square(pixels, side_px, look), row


def read_pixels(file: Path) -> np.ndarray:
    """Decode an image file as ingest does: uint8, upright, grey, BGR or BGRA.

    Raises UnreadError for what ingest would drop, with the same reason.
    """
    from training.data.image_reader import FILE_BYTES, FILE_PIXELS

    rules = Rules(
        timeout_s=0, retries=0, max_bytes=FILE_BYTES, max_pixels=FILE_PIXELS, allow_private=False
    )
    try:
        body = read_regular(file, FILE_BYTES)
        if body is None:
            raise UnreadError(("too_large", f"more than {FILE_BYTES >> 20} MiB"))
        check_image(body, rules)
        pixels = pixels_of(to_plain(io.BytesIO(body)).getvalue())
    except FetchError as error:
        raise UnreadError((error.reason, error.detail)) from error
    except OSError as error:
        raise UnreadError(("unreadable", error.strerror or type(error).__name__)) from error
    except (ValueError, cv2.error) as error:
        raise UnreadError(("decode_error", str(error))) from error
    if pixels is None:
        raise UnreadError(("decode_error", "it does not decode"))
    return pixels


def store(tar: tarfile.TarFile, name: str, picture: np.ndarray) -> dict[str, Any]:
    """Append an image to the shard as PNG; return its row fields: shard, member, offset, digest."""
    data = cv2.imencode(".png", picture[..., ::-1])[1].tobytes()
    member = tarfile.TarInfo(name)
    member.size = len(data)
    offset = tar.offset + tarfile.BLOCKSIZE
    tar.addfile(member, io.BytesIO(data))
    location = {"shard": "00000.tar", "member": name, "offset": offset, "size_bytes": len(data)}
    return location | {STORED_SHA256: hashlib.sha256(data).hexdigest()}


def new_rows(rows: pa.Table, view: "View") -> tuple[np.ndarray, dict[str, int]]:
    """Return which rows are new, and the row counts by reason.

    A row is new if it is not taken down, not in the index and not a repeat of an earlier row.
    """
    columns = {name: rows[name] for name in ("key", STORED_SHA256)}
    columns["origin"] = canonical_column(rows["origin"])  # of embeddings from an older release
    is_removed = np.asarray((view.removals or Removals()).mask(columns).to_numpy(), bool)
    keys = rows["key"].combine_chunks()
    is_present = np.zeros(len(rows), bool)
    for segment in view.segments:
        is_present |= np.asarray(
            pc.is_in(keys, segment.index.column("key").combine_chunks()).to_numpy(
                zero_copy_only=False
            ),
            bool,
        )
    _, first = np.unique(np.array(keys.to_pylist()), return_index=True)
    is_first = np.zeros(len(rows), bool)
    is_first[first] = True
    is_new = ~is_removed & ~is_present & is_first
    reasons = {
        "added": int(is_new.sum()),
        "removed": int(is_removed.sum()),
        "already_there": int((~is_removed & (is_present | ~is_first)).sum()),
    }
    return is_new, reasons


def write_embed(
    out: Path, rows: pa.Table, images: np.ndarray, texts: np.ndarray, run_lineage: Lineage
) -> None:
    """Write an embed folder with a single part. Raises DataError for NaN or infinite vectors."""
    (out / "metadata").mkdir()
    # First, because vectors without metadata cannot be attributed to a sample.
    pq.write_table(rows, out / "metadata" / "metadata_0000.parquet")
    for name, vectors in (("img_emb", images), ("text_emb", texts)):
        if not np.isfinite(vectors.astype(np.float32)).all():
            raise DataError("the embeddings hold NaN or infinity: embed again")
        (out / name).mkdir()
        np.save(out / name / f"{name}_0000.npy", vectors.astype(np.float16))
    facts = {
        "clip_key": run_lineage.clip.key,
        "clip_digest": run_lineage.fingerprint,
        "dim": int(images.shape[1]),
        "count": rows.num_rows,
    }
    (out / "facts.json").write_text(json.dumps(facts, indent=1))
