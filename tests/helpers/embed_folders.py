"""Writes a small embed folder: clustered unit vectors, texts near their pictures, metadata in the
same order.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from indexing.ann.factory import add, train
from indexing.data.embedding_store import chunks
from infra.schemas import EMBEDDED

KINDS = (
    "Flat",
    "IVF38,Flat",
    "IVF38,SQ8",
    "IVF38,RaBitQfs,Refine(SQ8)",
    "RR32,IVF38,PQ8x4fs,Refine(SQ8)",
    "RR32,IVF38(PQ16x4fs),PQ8x4fs,Refine(SQ8)",
)
"""Of index, for vectors of 32 dimensions."""


def vectors(count: int, dim: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float16]]:
    """Return float16 unit vectors (N, D) around forty centres."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(40, dim))
    made = centres[rng.integers(0, 40, count)] + 0.7 * rng.normal(size=(count, dim))
    return np.asarray(made / np.linalg.norm(made, axis=1, keepdims=True), np.float16)


def spread_out(
    counts: list[int], dim: int, power: float
) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
    """Return float32 unit vectors (N, D) for each count, without clusters: the spread of direction
    d is d ** power.
    """
    rng = np.random.default_rng(0)
    made = [rng.normal(size=(count, dim)) * np.arange(1, dim + 1) ** power for count in counts]
    return [
        (each / np.linalg.norm(each, axis=1, keepdims=True)).astype(np.float32) for each in made
    ]


def filled(factory: str, parts: list[np.ndarray[Any, Any]], seed: int) -> faiss.Index:
    """Return an index of that kind trained on the vectors and with all of them in it."""
    index = train(factory, parts, seed)
    add(index, chunks(parts))
    return index


def write_embed(
    folder: Path, count: int = 1500, dim: int = 32, parts: int = 2, copies: int = 1
) -> np.ndarray[Any, np.dtype[np.float16]]:
    """Write the folder in `parts` files of each kind and return the image vectors; each picture
    stands there `copies` times in a row.
    """
    image = np.repeat(vectors(-(-count // copies), dim), copies, axis=0)[:count]
    text = vectors(count, dim, seed=1)
    rows = [
        dict.fromkeys(EMBEDDED.names, "")
        | {
            "key": f"k{i:06d}",
            "origin": f"https://example.org/{i}.png",
            "caption": f"picture {i}",
            "captions": [f"picture {i}"],
        }
        | {
            "sha256": hashlib.sha256(str(i // copies).encode()).hexdigest(),
            "offset": i,
            "size_bytes": 1,
            "width_px": 8,
            "height_px": 8,
        }
        for i in range(count)
    ]
    for name in ("img_emb", "text_emb", "metadata"):
        (folder / name).mkdir(parents=True)
    for part, ids in enumerate(np.array_split(np.arange(count), parts)):
        np.save(folder / "img_emb" / f"img_emb_{part:04d}.npy", image[ids])
        np.save(folder / "text_emb" / f"text_emb_{part:04d}.npy", text[ids])
        table = pa.Table.from_pylist([rows[i] for i in ids], schema=EMBEDDED)
        pq.write_table(table, folder / "metadata" / f"metadata_{part:04d}.parquet")
    (folder / "facts.json").write_text(json.dumps({"clip_key": "abc", "dim": dim, "count": count}))
    return image


def exact(embed: Path, modality: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return the vectors (N, D) of an embed folder."""
    name = {"image": "img_emb", "text": "text_emb"}[modality]
    return np.concatenate([np.load(file) for file in sorted((embed / name).glob("*.npy"))]).astype(
        np.float32
    )


def cut(embed: Path, folder: Path, count: int) -> None:
    """Write the first rows of an embed folder as one of its own."""
    for name in ("img_emb", "text_emb"):
        (folder / name).mkdir(parents=True)
        whole = np.concatenate([np.load(file) for file in sorted((embed / name).glob("*.npy"))])
        np.save(folder / name / f"{name}_0000.npy", whole[:count])
    rows = pa.concat_tables(
        [pq.read_table(file) for file in sorted((embed / "metadata").glob("*.parquet"))]
    )
    (folder / "metadata").mkdir()
    pq.write_table(rows.slice(0, count), folder / "metadata" / "metadata_0000.parquet")
    facts = json.loads((embed / "facts.json").read_text())
    (folder / "facts.json").write_text(json.dumps(facts | {"count": count}))


def uneven(embed: Path, folder: Path, lengths: list[int]) -> Path:
    """Write the rows of an embed folder again, in files of so many rows."""
    cut(embed, folder, sum(lengths))
    for name in ("img_emb", "text_emb"):
        whole = np.load(folder / name / f"{name}_0000.npy")
        for number, rows in enumerate(np.split(whole, np.cumsum(lengths)[:-1])):
            np.save(folder / name / f"{name}_{number:04d}.npy", rows)
    return folder


def made(folder: Path) -> Path:
    """Make the folder and return it."""
    folder.mkdir()
    return folder
