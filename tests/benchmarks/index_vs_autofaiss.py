"""Our index against the one that autofaiss builds under the same memory bound, and against a sweep of FAISS factory strings.

    python -m tests.benchmarks.index_vs_autofaiss [--rows 100000] [--dim 512] [--kinds clustered,spectrum] [--bounds 16] [--embed FOLDER]
        [--keep FOLDER]

Clustered vectors lie around rows / 50 centres of unequal size, at 0.3 to 0.8 of the centres' own spread; `spectrum` has no clusters, only
the decaying spectrum that embeddings have; `isotropic` is the worst case, where only brute force finds anything. --embed takes the images
of an embed stage's folder instead. Queries are drawn like the rest and are not in the index. Bounds are shares of the float32 bytes: ours
holds the codes that it re-ranks from in a memory-mapped file, outside the bound, as it does in service (the size column has both).
Indexes are searched one query at a time by one thread, in turns; building uses --cores and is told in processor seconds, tuning
included. autofaiss may take an hour of them for a million vectors: --keep keeps what it built, and what that took, for another comparison.
Needs `make peers`.
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import numpy as np

from indexing import tuning
from indexing.embeddings import Floats, unit
from indexing.factories import choose_factory, fill, hot_bytes
from indexing.tuning import Effort, Sample, brute_force, recalls

TARGET, K, ROUNDS = 0.95, 10, 3
TUNED_ON, MEASURED = 1024, 512
QUERIES = TUNED_ON + MEASURED
PEER = Path(".peers/autofaiss/bin/python")
SWEPT = (
    "IVF{c},Flat",
    "IVF{c},SQ8",
    "IVF{c},RaBitQfs,Refine(SQ8)",
    "RR{d},IVF{c2},RaBitQfs,Refine(SQ8)",
    "RR{d},IVF{c2},PQ{p}x4fs,Refine(SQ8)",
    "RR{d},IVF{c4},PQ{p}x4fs,Refine(SQ8)",
    "RR{d},IVF{c2},PQ{p}x4fsr,Refine(SQ8)",
    "OPQ{p},IVF{c},PQ{p}x4fs,Refine(SQ8)",
)


class Searched(NamedTuple):
    """An index and how it is asked."""

    name: str
    index: Any
    effort: Effort | None
    """None: as its own parameters say."""
    build_s: float
    mbytes: str


def drawn(kind: str, rows: int, count: int, dim: int, seed: int) -> Floats:
    """Return unit vectors (count, dim) of a kind; those of equal `rows` belong together, whatever the seed."""
    rng = np.random.default_rng(seed)
    spectrum = (np.arange(1, dim + 1) ** -0.5).astype(np.float32)
    made = rng.standard_normal((count, dim), dtype=np.float32)
    if kind != "isotropic":
        made *= spectrum
    if kind == "clustered":
        centres = np.random.default_rng(rows).standard_normal((max(1, rows // 50), dim), dtype=np.float32) * spectrum
        share = np.arange(1, len(centres) + 1) ** -0.5
        made *= rng.uniform(0.3, 0.8, (count, 1)).astype(np.float32)
        made += centres[rng.choice(len(centres), count, p=share / share.sum())]
    return unit(made).astype(np.float16).astype(np.float32)


def embedded(folder: Path) -> tuple[Floats, Floats]:
    """Return the image vectors of an embed folder and those held back as queries."""
    vectors = unit(np.concatenate([np.load(file) for file in sorted((folder / "img_emb").glob("*.npy"))]).astype(np.float32))
    order = np.random.default_rng(0).permutation(len(vectors))
    return vectors[order[QUERIES:]], vectors[order[:QUERIES]]


def ours(name: str, factory: str, vectors: Floats, tuned_on: Floats, cores: int) -> Searched:
    """Build and tune as `unclip index` does; the queries tuned on are not those measured with."""
    faiss.omp_set_num_threads(cores)
    started = time.process_time()
    index = fill(factory, [vectors], 0)
    facts = tuning.tune(index, [vectors], [Sample(tuned_on, None)], TARGET)
    took = time.process_time() - started
    hot = hot_bytes(factory, *vectors.shape) / 1e6
    return Searched(
        f"{name} {factory}",
        index,
        Effort(facts["nprobe"], facts["k_factor"]),
        took,
        f"{hot:.0f} + {len(vectors) * vectors.shape[1] / 1e6:.0f}",
    )


def theirs(vectors_file: Path, bound: int, cores: int) -> Searched:
    """Build by autofaiss in its own environment, unless the folder holds what it built."""
    out = vectors_file.with_name(f"autofaiss_{bound}_{cores}.index")
    facts = out.with_suffix(".built")
    if not facts.exists():
        script = Path(__file__).parents[1] / "peers" / "autofaiss_peer.py"
        done = subprocess.run([PEER, script, vectors_file, out, str(bound), str(cores)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-600:])
        facts.write_text(done.stdout.splitlines()[-1])
    told = json.loads(facts.read_text())
    index = faiss.read_index(str(out))
    if told["parameters"]:
        faiss.ParameterSpace().set_index_parameters(index, told["parameters"])
    return Searched(f"autofaiss {told['key']} {told['parameters']}", index, None, told["seconds"], f"{out.stat().st_size / 1e6:.0f}")


def asked(each: Searched, queries: Floats) -> tuple[Floats, float]:
    """Return the rows found (B, K) and queries a second, one by one on one thread."""
    faiss.omp_set_num_threads(1)
    rows = []
    started = time.perf_counter()
    for query in queries:
        one = query[None]
        rows.append(each.index.search(one, K)[1] if each.effort is None else tuning.search(each.index, one, K, each.effort)[1])
    return np.concatenate(rows), len(queries) / (time.perf_counter() - started)


def compared(title: str, vectors: Floats, queries: Floats, divisor: int, cores: int, folder: Path, sweep: bool) -> None:
    """Measure all indexes under one bound; print Markdown rows."""
    tuned_on, measured = queries[:TUNED_ON], queries[TUNED_ON:]
    count, dim = vectors.shape
    bound = count * dim * 4 // divisor
    folder = folder / title.replace(" ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "vectors.npy"
    np.save(file, vectors)
    own = ours("ours", choose_factory(count, dim, 2 * bound), vectors, tuned_on, cores)
    found = [own, theirs(file, bound, cores)]
    cells = round(4 * count**0.5)
    for pattern in SWEPT if sweep else ():
        factory = pattern.format(c=cells, c2=cells // 2, c4=cells // 4, d=dim, p=dim // 4)
        if not own.name.endswith(f" {factory}") and dim % 4 == 0 and hot_bytes(factory, count, dim) <= bound:
            found.append(ours("swept", factory, vectors, tuned_on, cores))
    rounds = [[asked(each, measured) for each in found] for _ in range(ROUNDS)]
    truth = brute_force([vectors], measured, K)
    speeds = [statistics.median(each[place][1] for each in rounds) for place in range(len(found))]
    reached = [float(recalls([vectors], measured, rounds[0][place][0], truth).mean()) for place in range(len(found))]
    best = max((speed for speed, share in zip(speeds, reached, strict=True) if share >= TARGET - 0.01), default=speeds[0])
    shares = f"{speeds[0] / speeds[1]:.1f} times autofaiss's queries/s, built in {own.build_s / found[1].build_s:.2f} of its time"
    print(f"{title}, 1/{divisor} of float32: {shares}, {speeds[0] / best:.2f} of the fastest that has the recall", flush=True)
    for each, share, speed in zip(found, reached, speeds, strict=True):
        name = f"{each.name} {tuple(each.effort) if each.effort else ''}".strip()
        print(f"| {title} | 1/{divisor} | {name} | {share:.3f} | {speed:,.0f} | {each.build_s:.0f} | {each.mbytes} |", flush=True)


def main() -> None:
    """Compare on every kind of vectors under every bound and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--kinds", default="clustered,spectrum")
    parser.add_argument("--bounds", default="16")
    parser.add_argument("--embed", type=Path, help="an embed stage's folder: its images instead of drawn vectors")
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--keep", type=Path, help="where to keep the vectors and what autofaiss built of them")
    parser.add_argument("--no-sweep", action="store_true")
    given = parser.parse_args()
    if not PEER.exists():
        print("skipped: `make peers` builds autofaiss's environment")
        return
    print(f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {os.cpu_count()} cores, FAISS {faiss.__version__}")
    print("| vectors | bound | index (nprobe, k_factor) | recall@10 | queries/s | build CPU s | MB held + on disk |")
    print("|" + 7 * "---|", flush=True)
    for kind in ["embedded"] if given.embed else given.kinds.split(","):
        if given.embed:
            vectors, queries = embedded(given.embed)
        else:
            vectors, queries = (drawn(kind, given.rows, count, given.dim, seed) for seed, count in enumerate((given.rows, QUERIES)))
        for divisor in (int(each) for each in given.bounds.split(",")):
            title = f"{kind} {len(vectors):,} x {vectors.shape[1]}"
            with tempfile.TemporaryDirectory() as folder:
                kept = given.keep or Path(folder)
                compared(title, vectors, queries, divisor, given.cores, kept, sweep=not given.no_sweep)


if __name__ == "__main__":
    main()
