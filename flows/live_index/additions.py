"""Adds pictures or embeddings to a run's index without building it again: a folder of its own beside the run's, searched along with it.

Pictures (beside .txt captions, or named in a table of captions) are embedded by the run's own CLIP; embeddings must name that CLIP.
Writes ROOT/additions/<key>/: an embed folder, an index over it, and for pictures the shard that thumbnails are read from. The key
is made from what is added, so adding the same twice does nothing. An addition lasts as long as that CLIP: one that is trained anew does
not search it, which `unclip serve` and `unclip index add` say, and its pictures have to be added again.
"""

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from flows.live_index.leftovers import remove_leftovers
from flows.live_index.lineage import ADDITIONS, Lineage
from infra.errors import CallerError, DataError
from infra.schemas import EMBEDDED, sample_key
from infra.storage import manifests
from infra.storage.manifests import Committed
from infra.storage.removal_log import Removals
from infra.storage.store import Root
from infra.storage.temporary_folders import writing_folder

if TYPE_CHECKING:
    from indexing.ann.view import View
    from training.models.preprocessing import Look

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
FORMATS = ("PNG", "JPEG", "WEBP")
KEPT_PX = 256
ORIENTATION = 0x0112
"""EXIF's tag for how a picture lies."""
BATCH = 256
LEAST_BYTES = 64 << 20
"""Memory that the index of a small addition may take."""


def add(
    root: Root, known: Lineage, view: "View", source: Path, licence: str
) -> tuple[Committed | None, dict[str, int]]:
    """Add a folder; return the committed addition (None where nothing was left to add) and what became of its rows, by reason.

    A sample whose key is in the index already is left out, and one that was taken down stays down. Raises CallerError for a folder that
    holds neither, or embeddings of another CLIP, DataError for embeddings that disagree with their metadata.
    """
    remove_leftovers(root)
    with writing_folder(root.scratch, ADDITIONS) as out:
        if (source / "facts.json").is_file():
            rows, images, texts = read_embeddings(source, known)
            what: dict[str, Any] = {"embeddings": True}
        else:
            rows, images, texts = embed_pictures(source, known, licence, out)
            what = {"embeddings": False}
        is_new, reasons = new_rows(rows, view)
        if not any(is_new):
            return None, reasons
        rows = rows.filter(pa.array(is_new))
        write_embed(out, rows, images[is_new], texts[is_new], known)
        from indexing.ann.index import IndexConfig

        whole = IndexConfig.model_validate(known.index.manifest["sections"]["index"])
        memory_bytes = share_of(whole.memory_bytes, len(rows), view)
        dropped = {name: count for name, count in reasons.items() if name != "added"}
        return commit(
            root, known, out, rows["key"].to_pylist(), memory_bytes, dropped, what
        ), reasons


def commit(
    root: Root,
    known: Lineage,
    out: Path,
    keys: list[str],
    memory_bytes: int,
    dropped: dict[str, int],
    what: dict[str, Any],
) -> Committed:
    """Build an index over the embed folder in `out`, which holds the samples `keys`, and commit both as one addition.

    `dropped` counts the rows that were left out by reason, and `what` is the manifest's own part.
    """
    started = manifests.now()
    from indexing.ann.index import IndexConfig, build

    whole = IndexConfig.model_validate(known.index.manifest["sections"]["index"])
    section = whole.model_copy(update={"factory": "auto", "memory_bytes": memory_bytes})
    counts = build(section, out, out)
    key = hashlib.sha256("\n".join([known.fingerprint, *sorted(keys)]).encode()).hexdigest()[:16]
    facts = {
        "stage_version": 1,
        "clip_digest": known.fingerprint,
        "sections": {"index": section.model_dump(mode="json")},
        "inputs": {},
        "input_digests": {},
        "counts": {**counts, "dropped": dropped},
        "started": started,
    }
    return manifests.commit(root, ADDITIONS, key, out, facts | what)


def share_of(memory_bytes: int, count: int, view: "View") -> int:
    """Return what the index of so many more samples may take of the memory of all, by their number; at least LEAST_BYTES."""
    before = sum(segment.index.count for segment in view.segments)
    return min(memory_bytes, max(LEAST_BYTES, memory_bytes * count // (before + count)))


def read_embeddings(source: Path, known: Lineage) -> tuple[pa.Table, np.ndarray, np.ndarray]:
    """Read an embed folder whose facts name the run's CLIP. Returns metadata, vectors of pictures and of captions (N, D)."""
    facts = json.loads((source / "facts.json").read_text())
    if facts.get("clip_digest", facts.get("clip_key")) not in (known.fingerprint, known.clip.key):
        raise CallerError(
            f"{source} was embedded by CLIP {facts.get('clip_digest', facts.get('clip_key'))}, the index by {known.clip.key}: "
            "embed it with the run's own CLIP"
        )
    from indexing.data.embedding_store import open_parts, read_metadata

    count, dim = int(facts["count"]), int(facts["dim"])
    images, texts = (
        np.concatenate(open_parts(source / name, count, dim)) for name in ("img_emb", "text_emb")
    )
    table = read_metadata(source / "metadata", EMBEDDED.names, count).cast(EMBEDDED)
    # Shards are not carried along: such samples are found, but have no thumbnail.
    return (
        table.set_column(
            EMBEDDED.get_field_index("shard"), "shard", pa.array([""] * count, pa.string())
        ),
        images,
        texts,
    )


def embed_pictures(
    source: Path, known: Lineage, licence: str, out: Path
) -> tuple[pa.Table, np.ndarray, np.ndarray]:
    """Embed the pictures below a folder, each with the caption beside it, and write them as one shard into OUT/shards."""
    files = (
        sorted(path for path in source.rglob("*") if path.suffix.lower() in PICTURES)
        if source.is_dir()
        else []
    )
    if not files:
        raise CallerError(
            f"{source} holds neither embeddings (facts.json, img_emb/, text_emb/, metadata/) nor PNG, JPEG or WebP pictures"
        )
    from training.jobs import embed

    texts_of, images_of, side_px = embed.encoders(known.clip.local())
    look = embed.look_of(known.clip.local())
    (out / "shards").mkdir()
    rows: list[dict[str, Any]] = []
    images, texts = [], []
    with tarfile.open(out / "shards" / "00000.tar", "w") as tar:
        for batch in (files[start : start + BATCH] for start in range(0, len(files), BATCH)):
            squares = []
            for file in batch:
                square, row = read_one(file, side_px, look, licence, source)
                rows.append(row | store(tar, f"{len(rows):08d}.png", row.pop("picture")))
                squares.append(square)
            images.append(images_of(np.stack(squares)))
            texts.append(texts_of([row["caption"] or "a picture" for row in rows[-len(batch) :]]))
    table = pa.Table.from_pylist(rows, EMBEDDED)
    return (
        table,
        np.concatenate(images).astype(np.float16),
        np.concatenate(texts).astype(np.float16),
    )


def read_one(
    file: Path, side_px: int, look: "Look", licence: str, source: Path
) -> tuple[np.ndarray, dict[str, Any]]:
    """Return a picture as the encoder sees it, and its row with the picture that is kept of it, uint8 RGB."""
    from training.data.image_reader import read_file

    width_px, height_px = size_of(file)
    kept = read_file(file, min(KEPT_PX, max(width_px, height_px)))
    beside = file.with_suffix(".txt")
    caption = (
        " ".join(beside.read_text(errors="replace").split())[:2000]
        if beside.is_file()
        else file.stem.replace("_", " ").replace("-", " ")
    )
    origin = f"file:{file.relative_to(source)}#{manifests.file_sha256(file)[:16]}"
    row = dict.fromkeys(EMBEDDED.names, "") | {
        "key": sample_key(origin, caption),
        "origin": origin,
        "caption": caption,
        "captions": [caption],
        "licence": licence,
        "split": "added",
        "width_px": width_px,
        "height_px": height_px,
        "picture": kept,
    }
    return read_file(file, side_px, look), row


def size_of(file: Path) -> tuple[int, int]:
    """Return width and height of a picture file as it is shown; read from its header. Raises CallerError for what is none."""
    try:
        with Image.open(file, formats=FORMATS) as opened:
            lies = opened.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
            return (opened.height, opened.width) if lies else (opened.width, opened.height)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise CallerError(
            f"{file} is no picture that can be read ({error}): give a PNG, JPEG or WebP file"
        ) from None


def store(tar: tarfile.TarFile, name: str, picture: np.ndarray) -> dict[str, Any]:
    """Append a picture to the shard; return where it is."""
    data = cv2.imencode(".png", picture[..., ::-1])[1].tobytes()
    member = tarfile.TarInfo(name)
    member.size = len(data)
    offset = tar.offset + tarfile.BLOCKSIZE
    tar.addfile(member, io.BytesIO(data))
    place = {"shard": "00000.tar", "member": name, "offset": offset, "size_bytes": len(data)}
    return place | {"sha256": hashlib.sha256(data).hexdigest()}


def new_rows(rows: pa.Table, view: "View") -> tuple[np.ndarray, dict[str, int]]:
    """Return which rows are neither taken down, nor in the index, nor repeated, and how many were left out for which reason."""
    columns = {name: rows[name] for name in ("key", "origin", "sha256")}
    is_removed = np.asarray((view.removals or Removals()).mask(columns).to_numpy(), bool)
    keys = rows["key"].combine_chunks()
    is_known = np.zeros(len(rows), bool)
    for segment in view.segments:
        is_known |= np.asarray(
            pc.is_in(keys, segment.index.column("key").combine_chunks()).to_numpy(
                zero_copy_only=False
            ),
            bool,
        )
    _, first = np.unique(np.array(keys.to_pylist()), return_index=True)
    is_first = np.zeros(len(rows), bool)
    is_first[first] = True
    is_new = ~is_removed & ~is_known & is_first
    reasons = {
        "added": int(is_new.sum()),
        "removed": int(is_removed.sum()),
        "already_there": int((~is_removed & (is_known | ~is_first)).sum()),
    }
    return is_new, reasons


def write_embed(
    out: Path, rows: pa.Table, images: np.ndarray, texts: np.ndarray, known: Lineage
) -> None:
    """Write an embed folder of one part. Raises DataError for vectors that are not finite."""
    (out / "metadata").mkdir()
    pq.write_table(
        rows, out / "metadata" / "metadata_0000.parquet"
    )  # first: vectors alone do not say whose they are
    for name, vectors in (("img_emb", images), ("text_emb", texts)):
        if not np.isfinite(vectors.astype(np.float32)).all():
            raise DataError("the embeddings hold NaN or infinity: embed again")
        (out / name).mkdir()
        np.save(out / name / f"{name}_0000.npy", vectors.astype(np.float16))
    facts = {
        "clip_key": known.clip.key,
        "clip_digest": known.fingerprint,
        "dim": int(images.shape[1]),
        "count": rows.num_rows,
    }
    (out / "facts.json").write_text(json.dumps(facts, indent=1))
