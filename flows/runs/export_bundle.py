"""Write a self-contained folder of a run's models, with a model card and the run's lineage.

Reads a run's committed folders; writes only the new folder.
"""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from infra.errors import CallerError, StorageError
from infra.storage.manifest_schema import FileEntry
from infra.storage.manifests import Committed
from infra.storage.stage_files import StageFiles, file_sha256
from infra.storage.store import Root, one_line_errors

if TYPE_CHECKING:  # pyarrow, which `unclip --help` does not need
    import pyarrow as pa

    from flows.runs.record_schema import RunRecord
    from indexing.report.report_types import Report

NEEDED = ("clip", "prior", "decoder")


MODELS = (*NEEDED, "upsampler", "upsampler_2")


FILES = ("config.json", "weights.safetensors", "tokenizer.json")


FORMAT = 1


def write_export(root: Root, record: "RunRecord", folder: Path) -> list[FileEntry]:
    """Write a run's models, card and lineage to a folder; return its files.

    Returns path, size in bytes and SHA-256 of each file. Raises CallerError if the folder is not
    empty or the run lacks a model, and StorageError if a file does not match its manifest.
    """
    from flows.runs.records import committed_of

    stages = {
        stage: committed_of(root, record, stage)
        for stage in dict.fromkeys([*NEEDED, *record["stages"]])
    }
    return write_staged(folder, lambda staging: _fill(staging, record, stages))


def write_staged(folder: Path, fill: Callable[[Path], object]) -> list[FileEntry]:
    """Fill a temporary folder and rename it to `folder`; return its files.

    Returns path, size in bytes and SHA-256 of each file. Raises CallerError if the folder is not
    empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CallerError(f"{folder} is there already: give a folder that is new or empty")
    with one_line_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            fill(staging)
            written = _listed(staging)
            staging.chmod(0o755)
            staging.replace(folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return written


def _fill(staging: Path, record: "RunRecord", stages: dict[str, Committed]) -> None:
    from flows.runs.model_card import ModelConfig, card

    for stage in MODELS:
        if stage in stages:
            (staging / stage).mkdir()
            for name in FILES:
                if name != "tokenizer.json" or stage == "clip":
                    _copy(stages[stage], name, staging / stage / name)
    report: Report | None = None
    if "evaluate" in stages:
        evaluated = stages["evaluate"].files
        with evaluated.open("report.json") as file:
            report = json.load(file)
            sheet = report["generation"]["sheet"]
        with evaluated.local_copy(sheet) as folder:
            shutil.copyfile(folder / sheet, staging / "samples.png")
    manifests = {stage: committed.manifest for stage, committed in stages.items()}
    stage_facts = {
        stage: {name: value for name, value in manifest.items() if name != "prefix"}
        for stage, manifest in manifests.items()
    }
    lineage = {"format": FORMAT, "run": record, "stages": stage_facts}
    (staging / "lineage.json").write_text(json.dumps(lineage, indent=1, ensure_ascii=False) + "\n")
    facts: dict[str, ModelConfig] = {
        stage: json.loads((staging / stage / "config.json").read_text())
        for stage in MODELS
        if stage in stages
    }
    pictures = _pictures(stages["embed"]) if "embed" in stages else {}
    (staging / "README.md").write_text(card(record, manifests, facts, pictures, report))


def _copy(committed: Committed, name: str, to: Path) -> None:
    with committed.files.local_copy(name) as folder:
        shutil.copyfile(folder / name, to)
    expected = next(
        (file["sha256"] for file in committed.manifest["files"] if file["path"] == name), ""
    )
    if file_sha256(to) != expected:
        raise StorageError(
            f"{committed.uri}/{name} is not what its manifest says: "
            "run the pipeline again to make that stage anew"
        )


def _pictures(embed: Committed) -> dict[str, dict[str, int]]:
    """Return the number of training images by licence and by style."""
    from collections import Counter

    tables = [
        _read_columns(embed.files, name, ["split", "licence", "style"])
        for name in embed.files.names("metadata/*.parquet")
    ]
    rows = [row for table in tables for row in table.to_pylist() if row["split"] == "train"]
    return {
        name: dict(Counter(row[name] or "not stated" for row in rows).most_common())
        for name in ("licence", "style")
    }


def _read_columns(files: StageFiles, name: str, columns: list[str]) -> "pa.Table":
    import pyarrow.parquet as pq

    with files.open(name) as file:
        return pq.read_table(file, columns=columns)


def _listed(folder: Path) -> list[FileEntry]:
    return [
        {
            "path": str(file.relative_to(folder)),
            "bytes": file.stat().st_size,
            "sha256": file_sha256(file),
        }
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    ]
