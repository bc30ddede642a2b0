"""Packages are fetched once by the npm client and unpacked without letting the archive write
elsewhere or grow without bound.
"""

import gzip
import io
import os
import shutil
import stat
import tarfile
import tomllib
from pathlib import Path

import pytest

from flows.demo import npm_packages
from flows.demo.emoji_packages import FAMILIES
from flows.demo.npm_packages import package_folder, split_spec, unpack
from infra.errors import CallerError, DataError


def archive(path: Path, members: list[tarfile.TarInfo | tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for member in members:
            if isinstance(member, tuple):
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
            else:
                tar.addfile(member)
    return path


def link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def fake_npm(folder: Path, script: str) -> None:
    """Put a program named npm first on PATH, so that the tests need no network."""
    folder.mkdir()
    program = folder / "npm"
    program.write_text(f"#!/bin/sh\necho x >> {folder}/calls\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IEXEC)


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npm_packages.time, "sleep", lambda _: None)


def calls(tmp_path: Path) -> int:
    return len((tmp_path / "bin" / "calls").read_text().splitlines())


def use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Path:
    fake_npm(tmp_path / "bin", script)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return tmp_path / "cache"


def test_a_package_is_fetched_once_and_found_in_the_cache_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tarball = archive(
        tmp_path / "p.tgz", [("package/package.json", b"{}"), ("package/img/a.png", b"a")]
    )
    cache = use(tmp_path, monkeypatch, f"cp {tarball} ./p-1.0.0.tgz")
    for _ in range(2):
        folder = package_folder("@scope/p@1.0.0", cache)
        assert (folder / "img" / "a.png").read_bytes() == b"a"
    assert calls(tmp_path) == 1
    assert [entry.name for entry in cache.iterdir()] == ["@scope__p@1.0.0"]


def test_what_a_killed_fetch_left_is_not_taken_for_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tarball = archive(tmp_path / "p.tgz", [("package/a.png", b"a")])
    cache = use(tmp_path, monkeypatch, f"cp {tarball} ./p-1.0.0.tgz")
    old, young = cache / ".fetch-old" / "unpacked", cache / ".fetch-young"
    old.mkdir(parents=True)
    young.mkdir()
    os.utime(old.parent, (0, 0))
    assert (package_folder("p@1.0.0", cache) / "a.png").is_file()
    assert {entry.name for entry in cache.iterdir()} == {"p@1.0.0", ".fetch-young"}


def test_a_passing_failure_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tarball = archive(tmp_path / "p.tgz", [("package/a.png", b"a")])
    fails_once = f"[ $(wc -l < {tmp_path}/bin/calls) = 1 ] && exit 1; cp {tarball} ./p-1.0.0.tgz"
    cache = use(tmp_path, monkeypatch, fails_once)
    package_folder("p@1.0.0", cache, retries=1)
    assert calls(tmp_path) == 2


def test_a_package_that_does_not_exist_is_one_line_and_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "npm error code E404\nnpm error 404 Not Found - GET https://registry/p\nnpm error A complete log of this run can be found in: x"  # noqa: E501
    cache = use(tmp_path, monkeypatch, f"cat >&2 <<'E'\n{said}\nE\nexit 1")
    with pytest.raises(
        CallerError, match=r"^\[data\] package p@1\.0\.0 cannot be fetched: E404: Not Found"
    ) as caught:
        package_folder("p@1.0.0", cache, retries=3)
    assert "\n" not in str(caught.value)
    assert calls(tmp_path) == 1
    assert list(cache.iterdir()) == []


def test_a_machine_without_npm_is_told_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CallerError, match=r"p@1\.0\.0 needs the npm client.*install"):
        package_folder("p@1.0.0", tmp_path / "cache")


@pytest.mark.parametrize(
    "spec",
    [
        "p",
        "p@latest",
        "p@^1.0.0",
        "../p@1.0.0",
        "p@1.0.0/../../x",
        "-x@1.0.0 --foo",
        "@scope@1.0.0",
        "git+ssh://h/p@1.0.0",
    ],
)
def test_only_a_name_with_an_exact_version_is_a_package(spec: str) -> None:
    with pytest.raises(CallerError, match="name@version"):
        split_spec(spec)


@pytest.mark.parametrize(
    "name",
    [
        "package/../../evil",
        "package/a/../../../evil",
        "/package/../evil",
        "/abs/evil",
        "package",
        "package/sub/../evil",
        f"package/{'a/' * 100}evil",
    ],
)
def test_a_path_that_leaves_the_folder_refuses_the_whole_archive(tmp_path: Path, name: str) -> None:
    bad = archive(tmp_path / "bad.tgz", [("package/fine", b"1"), (name, b"evil")])
    with pytest.raises(DataError, match="unsafe path"):
        unpack(bad, tmp_path / "in" / "to")
    assert not list(tmp_path.rglob("evil"))


def test_links_and_devices_are_left_out_so_that_nothing_is_written_through_them(
    tmp_path: Path,
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    fifo = tarfile.TarInfo("package/fifo")
    fifo.type = tarfile.FIFOTYPE
    bad = archive(
        tmp_path / "bad.tgz",
        [
            link("package/dir", str(outside), tarfile.SYMTYPE),
            ("package/dir/evil", b"evil"),
            link("package/hard", "/etc/passwd", tarfile.LNKTYPE),
            link("package/soft", "../../outside", tarfile.SYMTYPE),
            fifo,
            ("package/fine", b"1"),
        ],
    )
    unpack(bad, tmp_path / "into")
    assert list(outside.iterdir()) == []
    found = {
        path.relative_to(tmp_path / "into").as_posix() for path in (tmp_path / "into").rglob("*")
    }
    assert found == {"dir", "dir/evil", "fine"}
    assert not any(path.is_symlink() for path in (tmp_path / "into").rglob("*"))


def test_an_archive_over_the_limits_is_refused(tmp_path: Path) -> None:
    many = archive(tmp_path / "many.tgz", [(f"package/{n}", b"") for n in range(11)])
    large = archive(
        tmp_path / "large.tgz", [("package/a", b"\0" * 600), ("package/b", b"\0" * 600)]
    )
    with pytest.raises(DataError, match="more than 10 files"):
        unpack(many, tmp_path / "a", max_files=10)
    with pytest.raises(DataError, match="1000 bytes"):
        unpack(large, tmp_path / "b", max_bytes=1000)
    unpack(large, tmp_path / "c", max_bytes=1200)


def test_an_archive_with_a_long_name_is_refused_before_the_name_is_read(tmp_path: Path) -> None:
    long = tarfile.TarInfo("x")
    long.type, long.size = tarfile.GNUTYPE_LONGNAME, 1 << 30
    with gzip.open(tmp_path / "long.tgz", "wb") as file:
        file.write(long.tobuf(tarfile.GNU_FORMAT) + b"a" * (1 << 20))
    with pytest.raises(DataError, match="headers of a member have more than"):
        unpack(tmp_path / "long.tgz", tmp_path / "into")


@pytest.mark.parametrize("content", [b"", b"no archive at all", b"\x1f\x8b\x08\x00garbage"])
def test_a_broken_archive_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "p.tgz").write_bytes(content)
    with pytest.raises(DataError, match=r"p\.tgz cannot be read") as caught:
        unpack(tmp_path / "p.tgz", tmp_path / "into")
    assert "\n" not in str(caught.value)


def test_a_truncated_archive_is_refused_and_leaves_nothing_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = archive(
        tmp_path / "p.tgz", [("package/a", os.urandom(50_000)), ("package/b", os.urandom(50_000))]
    )
    (tmp_path / "half.tgz").write_bytes(whole.read_bytes()[:60_000])
    cache = use(tmp_path, monkeypatch, f"cp {tmp_path}/half.tgz ./p-1.0.0.tgz")
    with pytest.raises(DataError, match="cannot be read"):
        package_folder("p@1.0.0", cache)
    assert list(cache.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("npm") is None, reason="needs the npm client")
def test_a_real_package_is_packed(tmp_path: Path) -> None:
    folder = package_folder("emojilib@4.0.3", tmp_path)
    assert "grinning_face" in (folder / "dist" / "emoji-en-US.json").read_text()


def test_the_larger_recipe_takes_every_picture_package_that_has_a_reader_and_holds_openmoji_out() -> (  # noqa: E501
    None
):
    recipe = tomllib.loads(
        (Path(__file__).parents[3] / "flows" / "recipes" / "emoji64.toml").read_text()
    )
    [source] = recipe["data"]["sources"]
    assert {split_spec(spec)[0] for spec in source["packages"]} == set(FAMILIES) and len(
        FAMILIES
    ) == 12
    assert recipe["curate"]["held_out_styles"] == ["openmoji"]
