"""Writes a self-contained folder of a run's models, with a card that says where they come from."""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from infra.errors import CallerError, StorageError
from infra.storage.manifests import Committed, file_sha256
from infra.storage.store import Root, one_line_errors

NEEDED = ("clip", "prior", "decoder")


MODELS = (*NEEDED, "upsampler", "upsampler_2")


FILES = ("config.json", "weights.safetensors", "tokenizer.json")


FORMAT = 1


def write_export(root: Root, record: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Write the folder aside and rename it into place; returns path, size and SHA-256 of its files.

    Raises CallerError where the folder holds something or the run has no decoder, StorageError where a stage's file is not what its
    manifest says.
    """
    from flows.runs.records import committed_of

    stages = {
        stage: committed_of(root, record, stage)
        for stage in dict.fromkeys([*NEEDED, *record["stages"]])
    }
    return write_aside(folder, lambda aside: _fill(aside, record, stages))


def write_aside(folder: Path, fill: Callable[[Path], object]) -> list[dict[str, Any]]:
    """Fill a folder aside and rename it into place; returns path, size and SHA-256 of its files. CallerError where it holds something."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CallerError(f"{folder} is there already: give a folder that is new or empty")
    with one_line_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            fill(aside)
            written = _listed(aside)
            aside.chmod(0o755)
            aside.replace(folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return written


def _fill(aside: Path, record: dict[str, Any], stages: dict[str, Committed]) -> None:
    from flows.runs.model_card import card

    for stage in MODELS:
        if stage in stages:
            (aside / stage).mkdir()
            for name in FILES:
                if name != "tokenizer.json" or stage == "clip":
                    _copy(stages[stage], name, aside / stage / name)
    report: dict[str, Any] = {}
    if "evaluate" in stages:
        evaluated = stages["evaluate"].local()
        report = json.loads((evaluated / "report.json").read_text())
        shutil.copyfile(evaluated / report["generation"]["sheet"], aside / "samples.png")
    manifests = {
        stage: {name: value for name, value in each.manifest.items() if name != "prefix"}
        for stage, each in stages.items()
    }
    lineage = {"format": FORMAT, "run": record, "stages": manifests}
    (aside / "lineage.json").write_text(json.dumps(lineage, indent=1, ensure_ascii=False) + "\n")
    facts = {
        stage: json.loads((aside / stage / "config.json").read_text())
        for stage in MODELS
        if stage in stages
    }
    pictures = _pictures(stages["embed"]) if "embed" in stages else {}
    (aside / "README.md").write_text(card(record, manifests, facts, pictures, report or None))


def _copy(committed: Committed, name: str, to: Path) -> None:
    shutil.copyfile(committed.local() / name, to)
    expected = next(
        (file["sha256"] for file in committed.manifest["files"] if file["path"] == name), ""
    )
    if file_sha256(to) != expected:
        raise StorageError(
            f"{committed.uri}/{name} is not what its manifest says: run the pipeline again to make that stage anew"
        )


def _pictures(embed: Committed) -> dict[str, dict[str, int]]:
    """Count the training pictures by licence and by style."""
    from collections import Counter

    import pyarrow.parquet as pq

    tables = [
        pq.read_table(file, columns=["split", "licence", "style"])
        for file in sorted((embed.local() / "metadata").glob("*.parquet"))
    ]
    rows = [row for table in tables for row in table.to_pylist() if row["split"] == "train"]
    return {
        name: dict(Counter(row[name] or "not stated" for row in rows).most_common())
        for name in ("licence", "style")
    }


def _listed(folder: Path) -> list[dict[str, Any]]:
    return [
        {
            "path": str(file.relative_to(folder)),
            "bytes": file.stat().st_size,
            "sha256": file_sha256(file),
        }
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    ]
