"""Time, memory and storage of every stage at three sizes, and what that comes to at 1M, 100M and 5B
pairs on cores like these.

Ingest, curate, embed and dedup take drawn pictures; what trains, and the index, takes longer lists
of the same pictures, so that what
grows with the list shows. Each measurement is a process of its own, with the quickstart's models.
`docs/scale.md` tells of the result.
"""

import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SIZES = (500, 2_000, 8_000)
LONG = (2_000, 8_000, 32_000)
LONGEST = (50_000, 200_000, 800_000)
TARGETS = (1_000_000, 100_000_000, 5_000_000_000)
DIM = 128
IMAGES = {"clip": 2_048, "prior": 2_048, "decoder": 512}
"""Images seen by a measured training; the paper's own: 650M by CLIP, 250M by the others,
whatever the size of the list.
"""


@dataclass(frozen=True)
class Cost:
    """How a stage is measured and how its time grows: `exponent` of the number of pairs; 0 for a
    training, which goes by images seen.
    """

    sizes: tuple[int, int, int]
    exponent: float
    run: Callable[[Path, int], int]
    """Does the work in a folder and returns the bytes that it would commit."""


def drawn(folder: Path, count: int) -> None:
    """Draw pictures that no other number has, beside their captions."""
    import cv2
    import numpy as np

    chance = np.random.default_rng(0)
    folder.mkdir()
    for number in range(count):
        blocks = chance.integers(0, 255, (6, 6, 3), dtype=np.uint8)
        cv2.imwrite(
            str(folder / f"{number}.png"),
            cv2.resize(blocks, (64, 64), interpolation=cv2.INTER_CUBIC),
        )
        (folder / f"{number}.txt").write_text(
            f"a picture of thing number {number}, drawn in the evening\n"
        )


def ingest(folder: Path, count: int) -> int:
    from flows.sources.url_table import DataConfig
    from tests.helpers.local_ingest import local_ingest, output_in

    source = {"kind": "folder", "path": str(folder.parent / f"pictures-{count}")}
    local_ingest(DataConfig.model_validate({"sources": [source]}), folder / "root")
    output_in(folder / "root").folder.rename(folder / "ingest")
    return size_of(folder / "ingest")


def curate(folder: Path, count: int) -> int:
    from flows.ingest import curate as stage
    from infra.storage.stage_files import FolderFiles

    config = stage.CurateConfig(held_out_concept_fraction=0)
    stage.run(config, FolderFiles(folder / "ingest"), folder / "curate")
    return size_of(folder / "curate")


def write_clip(folder: Path) -> None:
    """Write a CLIP of the quickstart's size that has learnt nothing, and its tokenizer."""
    import torch

    from training.data.image_reader import read_table
    from training.jobs import train
    from training.models.clip import CLIP
    from training.models.tokenizer import Tokenizer

    config = quickstart()
    captions = read_table(folder / "curate" / "keep.parquet")["caption"].to_pylist()
    (folder / "clip").mkdir()
    tokenizer = Tokenizer.fit(captions, config.tokenizer)
    tokenizer.save(folder / "clip" / "tokenizer.json")
    torch.manual_seed(0)
    model = CLIP(config.clip, tokenizer.vocab_size, tokenizer.context)
    train.write_model("clip", model, model.state_dict(), config.clip, folder / "clip")


def embed(folder: Path, count: int) -> int:
    """Embed in this process, part by part, as Ray's tasks do it."""
    from tests.helpers.stage_folders import embed_folders, shards_in
    from training.data import shard_check
    from training.data.image_reader import read_table
    from training.jobs import embed as stage

    config, out = stage.EmbedConfig(), folder / "embed"
    folders = embed_folders(folder, folder / "embed-work")
    table = read_table(folder / "curate" / "keep.parquet", columns=shard_check.READ)
    shard_check.settle(table, shards_in(folder / "ingest"), "stop", folders.work)
    parts, pairs = stage.cut(config, folders.curate, folders.work)
    for number in range(parts):
        stage._embed_part(config, number, len(os.sched_getaffinity(0)), False, folders)
    folders.output.folder.rename(out)
    (out / "facts.json").write_text(json.dumps({"clip_key": "key", "dim": DIM, "count": pairs}))
    return size_of(out)


def dedup(folder: Path, count: int) -> int:
    from indexing.dedup import deduplicate
    from tests.helpers.stage_folders import shards_in
    from training.jobs import embed as embedding

    _, encode_images, side_px = embedding.encoders(folder / "clip")
    (folder / "dedup").mkdir()
    deduplicate.run(
        deduplicate.DedupConfig(),
        shards_in(folder / "ingest"),
        folder / "embed",
        encode_images,
        side_px,
        folder / "dedup",
    )
    return size_of(folder / "dedup")


def lengthen(folder: Path, count: int) -> None:
    """Write `long`, a keep list and embeddings of `count` rows over the pictures of the middle
    size, each row with its own key.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from infra.schemas import EMBEDDED

    table = pq.read_table(folder / "curate" / "keep.parquet")
    rows = table.take(pa.array(np.arange(count) % table.num_rows))
    captions = pa.array(
        [f"{text} {number}" for number, text in enumerate(rows["caption"].to_pylist())]
    )
    rows = rows.set_column(0, "key", pa.array([f"{number:016x}" for number in range(count)]))
    rows = rows.set_column(rows.column_names.index("caption"), "caption", captions)
    rows = rows.set_column(
        rows.column_names.index("captions"),
        "captions",
        pa.array([[text] for text in captions.to_pylist()]),
    )
    target = folder / "long"
    for name in ("img_emb", "text_emb", "metadata"):
        (target / name).mkdir(parents=True)
    pq.write_table(rows.cast(EMBEDDED), target / "keep.parquet")
    pq.write_table(rows.cast(EMBEDDED), target / "metadata" / "metadata_0000.parquet")
    chance = np.random.default_rng(0)
    centres = chance.standard_normal((200, DIM), dtype=np.float32)
    for name in ("img_emb", "text_emb"):
        vectors = centres[np.arange(count) % 200] + 0.7 * chance.standard_normal(
            (count, DIM), dtype=np.float32
        )
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        np.save(target / name / f"{name}_0000.npy", vectors.astype(np.float16))
    (target / "facts.json").write_text(json.dumps({"clip_key": "key", "dim": DIM, "count": count}))


def index(folder: Path, count: int) -> int:
    from indexing.ann import index as stage
    from indexing.ann.factory import CODED_CENTROIDS_FROM, POINTS_PER_CELL

    (folder / "index").mkdir()
    cells = min(
        round(16 * math.sqrt(count)), count // POINTS_PER_CELL
    )  # one kind at all sizes: that of large ones
    coded = f"(PQ{DIM // 2}x4fs)" if cells >= CODED_CENTROIDS_FROM else ""
    stage.build(
        stage.IndexConfig(factory=f"RR{DIM},IVF{cells}{coded},PQ{DIM // 4}x4fs,Refine(SQ8)"),
        folder / "long",
        folder / "index",
    )
    return size_of(folder / "index")


def trained(name: str) -> Callable[[Path, int], int]:
    """Return the training of one model on the long list, in this process, as a worker does it."""

    def run(folder: Path, count: int) -> int:
        import shutil

        import torch

        from tests.helpers.stage_folders import folders_of
        from training.data import shard_check
        from training.data.image_reader import read_table
        from training.jobs import train

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        work = folder / f"{name}-work"
        stages = {"ingest": "ingest", "curate": "long", "clip": "clip", "embed": "long"}
        paths = {stage: folder / where for stage, where in stages.items()}
        folders = folders_of(paths, folder / "store", work)
        shutil.copyfile(folder / "clip" / "tokenizer.json", work / "tokenizer.json")
        section = getattr(quickstart(), name).model_copy(update={"images": IMAGES[name]})
        table = read_table(folder / "long" / "keep.parquet", "train")
        shard_check.settle(table, folders.shards, "stop", folders.work)
        model, averaged = getattr(train, f"fit_{name}")(section, folders, "cpu")
        train.write_model(name, model, averaged, section, work)
        row = json.loads((work / "metrics.jsonl").read_text().splitlines()[-1])
        print(json.dumps({"training_s": row["seconds"]}), flush=True)
        return size_of(work) - (work / "state.pt").stat().st_size

    return run


def lists(folder: Path, count: int) -> int:
    """Hold what a worker that trains the decoder holds of every pair: the place of its picture, its
    captions' ids, and where its z_i is.
    """
    import torch

    from tests.helpers.stage_folders import shards_in
    from training.data import embedding_dataset, image_reader
    from training.models.tokenizer import Tokenizer

    image_reader.CACHE_BYTES = 0  # which is bounded
    table, z_i = embedding_dataset.read(
        folder / "long", "train", ["captions", "key", *image_reader.LOCATION]
    )
    held = image_reader.Pictures(table, shards_in(folder / "ingest"), 32)
    texts = embedding_dataset.Captions(
        table["captions"], Tokenizer.load(folder / "clip" / "tokenizer.json")
    )
    rows = torch.arange(0, len(z_i), len(z_i) // 64)
    assert len(held[rows]) == len(z_i[rows]) == len(texts.draw(rows, torch.zeros(len(rows)))[0])
    return 0


COSTS = {
    "ingest": Cost(SIZES, 1, ingest),
    "curate": Cost(SIZES, 1, curate),
    "embed": Cost(SIZES, 1, embed),
    "dedup": Cost(SIZES, 1, dedup),
    "index": Cost(LONG, 1.5, index),
    "clip": Cost(LONG, 0, trained("clip")),
    "prior": Cost(LONG, 0, trained("prior")),
    "decoder": Cost(LONG, 0, trained("decoder")),
    "a worker's lists": Cost(LONGEST, 1, lists),
}


def quickstart() -> Any:
    """Return the quickstart's config."""
    from flows.config.run_config import load_recipe

    return load_recipe("quickstart")


def size_of(folder: Path) -> int:
    """Return the bytes of a folder's files."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def child(name: str, folder: Path, count: int) -> None:
    """Do one measurement and print it."""
    if name in ("write_clip", "lengthen"):
        write_clip(folder) if name == "write_clip" else lengthen(folder, count)
        return
    clock = time.monotonic()
    stored = COSTS[name].run(folder, count)
    seconds = time.monotonic() - clock
    peak = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    print(json.dumps({"seconds": seconds, "peak": peak, "stored": stored}))


def measured(name: str, folder: Path, count: int) -> dict[str, float]:
    """Measure in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "tests.benchmarks.scale",
        "--in",
        name,
        str(folder),
        str(count),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} of {count:,} failed: {done.stderr[-2000:]}")
    told: dict[str, float] = {}
    for line in done.stdout.splitlines():
        told |= json.loads(line)
    return told


def amount(value: float, unit: str) -> str:
    """Write seconds or bytes for people."""
    steps = {
        "s": ((86_400 * 365, "years"), (86_400, "days"), (3_600, "h"), (60, "min"), (1, "s")),
        "B": ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")),
    }[unit]
    for size, word in steps:
        if value >= size:
            return f"{value / size:.3g} {word}"
    return f"{value:.2g} {unit}"


def growth(sizes: tuple[int, int, int], values: list[float]) -> str:
    """Return e of a + b n^e through three values at sizes of equal ratio, or where they do not
    grow, "none".
    """
    first, second = values[1] - values[0], values[2] - values[1]
    if first <= 0 or second <= 0 or values[2] < 1.05 * values[0]:
        return "none"
    return f"n^{math.log(second / first) / math.log(sizes[1] / sizes[0]):.1f}"


def rows_of(name: str, cost: Cost, found: list[dict[str, float]]) -> tuple[str, str]:
    """Return a stage's line of what was measured and its line of what follows."""
    sizes, (low, high) = cost.sizes, (found[0], found[-1])
    span = sizes[-1] - sizes[0]
    memory = max(0.0, (high["peak"] - low["peak"]) / span)
    each = [
        amount(one["training_s"] / IMAGES[name] if not cost.exponent else one["seconds"], "s")
        for one in found
    ]
    times = [one["seconds"] for one in found]
    seen = [f"{amount(one['peak'], 'B')}" for one in found]
    stored = [amount(one["stored"], "B") for one in found]
    grows = growth(sizes, [one["stored"] for one in found])
    head = f"| {name} | {' · '.join(f'{size:,}' for size in sizes)} | {' · '.join(each)}{' an image' if not cost.exponent else ''} "  # noqa: E501
    shown = growth(sizes, times) if cost.exponent else "images seen"
    top = (
        head
        + f"| {shown} | {' · '.join(seen)} | {memory:,.0f} B | {' · '.join(stored)} | {grows} |"
    )
    cells = []
    for target in TARGETS:
        if cost.exponent:
            slope = (high["seconds"] - low["seconds"]) / (
                sizes[-1] ** cost.exponent - sizes[0] ** cost.exponent
            )
            took = amount(max(0.0, slope) * target**cost.exponent, "s")
            kept = amount((high["stored"] - low["stored"]) / span * target, "B")
        else:
            took, kept = "by images", amount(high["stored"], "B")
        # What short lists add is mostly buffers that fill up: memory is foretold from long lists
        # only.
        cells.append(
            f"{took}, {amount(low['peak'] + memory * target, 'B')} held"
            if sizes == LONGEST
            else f"{took}, {kept}"
        )
    return top, f"| {name} | {' | '.join(cells)} |"


def main() -> int:
    """Measure all and print both tables."""
    if sys.argv[1:2] == ["--in"]:
        child(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
        return 0
    os.environ |= {"NO_ALBUMENTATIONS_UPDATE": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in COSTS}
    started = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    with tempfile.TemporaryDirectory() as temporary:
        folders = {count: Path(temporary) / f"of-{count}" for count in SIZES}
        for count, folder in folders.items():
            drawn(Path(temporary) / f"pictures-{count}", count)
            folder.mkdir()
            for name in ("ingest", "curate", "write_clip", "embed", "dedup"):
                told = measured(name, folder, count)
                if told:
                    found[name].append(told)
                    print(f"{name} of {count:,}: {told}", file=sys.stderr, flush=True)
        for count in LONG + LONGEST:
            long = Path(temporary) / f"long-{count}"
            long.mkdir()
            for name in ("ingest", "curate", "clip"):
                (long / name).symlink_to(folders[SIZES[1]] / name)
            measured("lengthen", long, count)
            for name in (
                ("index", "clip", "prior", "decoder") if count in LONG else ("a worker's lists",)
            ):
                found[name].append(measured(name, long, count))
                print(f"{name} over {count:,}: {found[name][-1]}", file=sys.stderr, flush=True)
    cores = f"{len(os.sched_getaffinity(0))} cores {platform.processor() or platform.machine()}"
    print(f"Measured {started}, {cores}, load of the last 15 min {os.getloadavg()[2]:.1f}\n")
    lines = [rows_of(name, cost, found[name]) for name, cost in COSTS.items()]
    print(
        "| stage | pairs | time | grows | peak memory | a pair more | committed | grows "
        "|\n|---|---|---|---|---|---|---|---|"
    )
    print("\n".join(top for top, _ in lines))
    print(
        f"\n| stage | {' | '.join(f'{target:,} pairs' for target in TARGETS)} |\n|---|---|---|---|"
    )
    print("\n".join(below for _, below in lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
