"""Writes a small run for the evaluation: coloured pictures in a shard, an embed folder over them,
and models that know the colours.

A concept is a colour; its pictures are a plain square and a framed one, its vector a direction of
its own, so figures are known.
"""

import base64
import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from indexing.data.held_out import open_embedded
from indexing.evaluation.context import Subject
from infra.schemas import EMBEDDED
from infra.storage.shard_reader import ShardReader
from infra.storage.stage_files import FolderFiles

DIM = 16
HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)> & {{ 7 * 7 }}'


def colour(concept: int) -> tuple[int, int, int]:
    """Return the RGB colour of a concept, each different by far."""
    return (concept * 83 % 256, concept * 151 % 256, concept * 211 % 256)


def direction(concept: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return the unit vector of a concept (D,)."""
    made = np.random.default_rng(concept + 1).normal(size=DIM).astype(np.float32)
    return np.asarray(made / np.linalg.norm(made), np.float32)


def draw(concept: int, style: str, side_px: int = 20) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Draw a concept in a style, RGB."""
    picture = np.full((side_px, side_px, 3), colour(concept), np.uint8)
    if style == "framed":
        picture[:2] = picture[-2:] = 255
    return picture


def png(concept: int, side_px: int = 20) -> bytes:
    """Return the plain picture of a concept as a file."""
    return cv2.imencode(".png", draw(concept, "plain", side_px)[..., ::-1])[1].tobytes()


def b64(data: bytes) -> str:
    """Return bytes as a question takes them."""
    return base64.b64encode(data).decode()


def row(number: int, style: str, split: str, /, **more: Any) -> dict[str, Any]:
    """Return the metadata of one pair, without its place in a shard."""
    caption = f"colour {number}"
    return {
        "number": number,
        "key": hashlib.sha256(f"{number} {style} {more}".encode()).hexdigest()[:16],
        "origin": f"https://example.org/{number}-{style}",
        "caption": caption,
        "captions": [caption, f"a {caption}"],
        "licence": "CC0",
        "concept": f"c{number}",
        "style": style,
        "category": "Warm & Bright" if number % 2 else "cold",
        "subcategory": f"third-{number % 3}",
        "split": split,
    } | more


def usual_rows() -> list[dict[str, Any]]:
    """Return twelve trained concepts and four held-out ones, plain and framed, and all of them in a
    held-out style.
    """
    trained = [
        row(concept, style, "train") for concept in range(12) for style in ("plain", "framed")
    ]
    unseen = [
        row(concept, style, "held_out_concept")
        for concept in range(12, 16)
        for style in ("plain", "framed")
    ]
    return trained + unseen + [row(concept, "other", "held_out_style") for concept in range(16)]


def write_run(folder: Path, rows: Sequence[dict[str, Any]], vectors: Any = None) -> None:
    """Write `folder`/shards and `folder`/embed; vectors (N, D) replace those of pictures and
    captions alike.
    """
    (folder / "shards").mkdir(parents=True)
    table = []
    with tarfile.open(folder / "shards" / "00000.tar", "w") as tar:
        for place, each in enumerate(rows):
            picture = draw(each["number"], each["style"])
            picture[0, 0] = place % 251  # no two pictures with equal bytes
            data = cv2.imencode(".png", picture[..., ::-1])[1].tobytes()
            member = tarfile.TarInfo(f"{place:09d}.png")
            member.size = len(data)
            offset = tar.offset + tarfile.BLOCKSIZE
            tar.addfile(member, io.BytesIO(data))
            about = {
                "shard": "00000.tar",
                "member": member.name,
                "offset": offset,
                "size_bytes": len(data),
                "width_px": 20,
                "height_px": 20,
            }
            table.append(
                {name: value for name, value in each.items() if name != "number"}
                | about
                | {"sha256": hashlib.sha256(data).hexdigest()}
            )
    image = (
        np.array([direction(each["number"]) for each in rows], np.float16)
        if vectors is None
        else np.asarray(vectors, np.float16)
    )
    for name in ("img_emb", "text_emb", "metadata"):
        (folder / "embed" / name).mkdir(parents=True)
    np.save(folder / "embed" / "img_emb" / "img_emb_0000.npy", image.reshape(len(rows), DIM))
    np.save(folder / "embed" / "text_emb" / "text_emb_0000.npy", image.reshape(len(rows), DIM))
    pq.write_table(
        pa.Table.from_pylist(table, schema=EMBEDDED),
        folder / "embed" / "metadata" / "metadata_0000.parquet",
    )
    (folder / "embed" / "facts.json").write_text(
        json.dumps({"clip_key": "abc", "dim": DIM, "count": len(rows)})
    )


def encode_texts(texts: list[str]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Embed "colour N" as the direction of concept N, any other text as a direction of its own."""
    numbers = [
        int(text.split()[-1]) if text.split()[-1].isdigit() else 1000 + sum(text.encode())
        for text in texts
    ]
    return np.array([direction(number) for number in numbers], np.float32).reshape(len(texts), DIM)


def encode_images(pictures: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Embed pictures as the direction of the concept whose colour is in the middle."""
    middle = pictures[:, pictures.shape[1] // 2, pictures.shape[2] // 2].astype(int)  # (N, 3)
    palette = np.array([colour(concept) for concept in range(16)])
    return np.array(
        [direction(int(np.abs(palette - each).sum(1).argmin())) for each in middle], np.float32
    ).reshape(-1, DIM)


def generate(prompts: Sequence[str], count: int, seed: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Draw the prompt's concept (the first one for other prompts) plainly, a little noise on it."""
    noise = np.random.default_rng(seed).integers(0, 3, (len(prompts), count, 16, 16, 3))
    numbers = [int(prompt.split()[-1]) if prompt.split()[-1].isdigit() else 0 for prompt in prompts]
    return (
        np.array([[draw(number, "plain", 16)] * count for number in numbers], np.uint8) // 2 * 2
        + noise.astype(np.uint8) % 2
    )


def manifest(stage: str, inputs: dict[str, str] | None = None, **counts: Any) -> dict[str, Any]:
    """Return what a stage's manifest holds, as far as reports read it."""
    return {
        "stage": stage,
        "key": hashlib.sha256(stage.encode()).hexdigest()[:16],
        "inputs": inputs or {},
        "counts": {"in": 40, "out": 38, "dropped": {"decode_error": 2}} | counts,
        "files": [{"path": "a", "bytes": 1234567}],
        "started": "2026-11-23T10:00:00.000000Z",
        "finished": "2026-11-23T10:01:05.500000Z",
        "packages": {"python": "3.11.7", "numpy": "2.4.6"},
    }


def subject(folder: Path, texts: Any = encode_texts, images: Any = encode_images) -> Subject:
    """Return what `write_run` wrote into a folder, seen by these models, with its report's folder
    beside it.
    """
    return Subject(
        open_embedded(folder / "embed"),
        ShardReader(FolderFiles(folder)),
        texts,
        images,
        200,
        0,
        folder / "out",
    )
