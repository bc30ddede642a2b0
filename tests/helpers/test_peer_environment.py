"""A comparison with a peer is left out only where the peer could not be had, and then `make test`
says so.
"""

import os
import subprocess
from pathlib import Path

import pytest

from tests.helpers import peer_environment

HERE = Path(__file__).parents[2]


def test_a_peer_that_is_missing_skips_and_one_that_was_built_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_environment, "PEERS", tmp_path)
    monkeypatch.delenv(peer_environment.REQUIRED, raising=False)
    with pytest.raises(pytest.skip.Exception, match=r"make \.peers/open_clip/ready"):
        peer_environment.interpreter_of("open_clip")
    monkeypatch.setenv(peer_environment.REQUIRED, "dalle2 open_clip")
    with pytest.raises(pytest.fail.Exception, match=r"open_clip is not installed"):
        peer_environment.interpreter_of("open_clip")
    python = tmp_path / "open_clip" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    assert peer_environment.interpreter_of("open_clip") == python


@pytest.mark.parametrize("is_built", [True, False])
def test_make_test_requires_the_peer_that_it_built_and_tells_of_one_that_it_could_not(
    is_built: bool, tmp_path: Path
) -> None:
    bin_folder, peers = tmp_path / "venv" / "bin", tmp_path / "peers"
    bin_folder.mkdir(parents=True)
    (bin_folder / "python").write_text('#!/bin/sh\necho "required: $PEERS_REQUIRED"\n')
    (bin_folder / "python").chmod(0o755)
    (tmp_path / "venv" / "ready").touch()
    if is_built:
        (peers / "open_clip").mkdir(parents=True)
        (peers / "open_clip" / "ready").touch()
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PEERS_REQUIRED", "MAKEFLAGS", "MAKELEVEL")
    }
    told = [
        f"VENV={tmp_path / 'venv'}",
        f"PEERS={peers}",
        "PYTHON=false",
    ]  # nothing can be built with such a Python
    done = subprocess.run(
        ["make", "test", *told], cwd=HERE, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert ("required: open_clip" in done.stdout) == is_built
    assert ("NOT COMPARED with open_clip" in done.stdout.splitlines()[-1]) == (not is_built)
