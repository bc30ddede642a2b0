"""Local folders as stages see them: their files by name, their shards, a training's folders."""

from collections.abc import Mapping
from pathlib import Path

from infra.storage import store
from infra.storage.shard_reader import ShardReader
from infra.storage.stage_files import FolderFiles
from infra.storage.stage_output import open_output
from infra.storage.work_folder import local_work
from training.jobs.embed import EmbedFolders
from training.jobs.train import TrainingFolders


def shards_in(stage: Path) -> ShardReader:
    """Return a reader of `stage`/shards."""
    return ShardReader(FolderFiles(stage))


def training_folders(root: Path, work: Path, *stages: str, key: str = "k") -> TrainingFolders:
    """Return the folders of a training that reads `root`/<stage> and puts its model into ROOT.

    The model is in `.output.folder`, the state in `work`.
    """
    return folders_of({stage: root / stage for stage in stages}, root / "store", work, key)


def folders_of(
    stages: Mapping[str, Path], into: Path, work: Path, key: str = "k"
) -> TrainingFolders:
    """Return the folders of a training that reads these stage folders; its ROOT is `into`."""
    work.mkdir(parents=True, exist_ok=True)
    output = open_output(store.open_root(str(into), for_writing=False), "model", key)
    inputs = {stage: FolderFiles(folder) for stage, folder in stages.items()}
    return TrainingFolders(inputs, output, local_work(work))


def embed_folders(root: Path, work: Path, key: str = "k") -> EmbedFolders:
    """Return the folders of an embedding that reads `root`/<stage>, likewise."""
    work.mkdir(parents=True, exist_ok=True)
    output = open_output(store.open_root(str(root / "store"), for_writing=False), "embed", key)
    files = {stage: FolderFiles(root / stage) for stage in ("ingest", "curate", "clip")}
    return EmbedFolders(**files, output=output, work=local_work(work))
