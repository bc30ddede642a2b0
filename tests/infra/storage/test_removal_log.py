"""The removal log reads regular files only, and joins many entries as it joins few."""

import os
import socket
from functools import reduce
from operator import or_
from pathlib import Path

from infra.storage.removal_log import (
    FOLDER,
    Removals,
    entry_names,
    read_removals,
    union,
    write_removal,
)
from infra.storage.store import open_root

TIME = "2026-11-29T12:00:00.000000Z"


def test_only_regular_files_are_entries(tmp_path: Path) -> None:
    root = open_root(str(tmp_path))
    assert entry_names(root) == []
    name = write_removal(root, {"keys": ["a"], "origins": [], "sha256": []}, TIME)
    folder, elsewhere = tmp_path / FOLDER, tmp_path / "elsewhere.json"
    elsewhere.write_text('{"keys": ["b"], "origins": [], "sha256": []}')
    os.mkfifo(folder / "1.json")
    (folder / "2.json").mkdir()
    (folder / "3.json").symlink_to("/dev/zero")
    (folder / "4.json").symlink_to(tmp_path / "nowhere")
    (folder / "5.json").symlink_to(elsewhere)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "6.json"))
    assert entry_names(root) == sorted([f"{name}.json", "5.json"])
    assert read_removals(root).keys == {"a", "b"}


def test_a_union_is_that_of_all() -> None:
    parts = [
        Removals(frozenset({f"k{number}"}), frozenset(), frozenset({f"s{number % 3}"}))
        for number in range(50)
    ]
    assert union(parts) == reduce(or_, parts) and union([]) == Removals()
