"""Fetches npm packages into a cache folder and unpacks them safely.

A package is named `name@version`. It is fetched with `npm pack`, which installs nothing and runs no
scripts, and unpacked once. Writes only CACHE/<name>@<version>/; such a folder is always complete.
"""

import gzip
import re
import shutil
import subprocess
import tarfile
import tempfile
import time
import zlib
from pathlib import Path

from infra.errors import CallerError, DataError
from infra.storage.bounded_tar import read_members

MAX_FILES = 100_000
MAX_UNPACKED_BYTES = 2 * 2**30
MAX_FILE_BYTES = 2**28
"""Maximum bytes of one file; readers hold a file of icons in memory."""
MAX_DEPTH = 32
"""Maximum folders that a file lies in."""
PACK_TIMEOUT_S = 300
SPEC = re.compile(r"((?:@[a-z0-9._~-]+/)?[a-z0-9._~-]+)@(\d[0-9A-Za-z.+-]*)")


def split_spec(spec: str) -> tuple[str, str]:
    """Split `name@version` into its parts.

    Raises CallerError if the version is not exact, because a recipe must always mean the same
    images.
    """
    match = SPEC.fullmatch(spec)
    if not match or ".." in spec:
        raise CallerError(
            f"[data] package {spec!r} must be written name@version with an exact version, such as "
            "openmoji@17.0.0"
        )
    return match[1], match[2]


def package_folder(spec: str, cache: Path, retries: int = 2) -> Path:
    """Return the folder of the unpacked package; fetch the package if the cache lacks it.

    Raises CallerError if npm is missing or cannot fetch the package, and DataError if the archive
    is hostile or broken.
    """
    name, version = split_spec(spec)
    folder = cache / f"{name.replace('/', '__')}@{version}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    for leftover in cache.glob(".fetch-*"):
        # Left by a killed run; a younger one may belong to a run that is fetching now.
        if time.time() - leftover.stat().st_mtime > 86_400:
            shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache) as scratch:
        archive = pack(spec, Path(scratch), retries)
        unpacked = Path(scratch) / "unpacked"
        unpack(archive, unpacked)
        try:
            unpacked.rename(folder)
        except OSError:
            if not folder.is_dir():  # another run was faster: use its copy
                raise
    return folder


def pack(spec: str, into: Path, retries: int) -> Path:
    """Run `npm pack` and return the path of the tarball. Raises CallerError if it fails."""
    npm = shutil.which("npm")
    if npm is None:
        raise CallerError(
            f"[data] package {spec} needs the npm client, which is not on PATH: install Node.js "
            "with npm"
        )
    problem = ""
    for attempt in range(retries + 1):
        if attempt:
            time.sleep(2**attempt)
        try:
            done = subprocess.run(
                [npm, "pack", spec, "--loglevel=error", "--ignore-scripts"],
                cwd=into,
                capture_output=True,
                text=True,
                timeout=PACK_TIMEOUT_S,
            )
        except subprocess.TimeoutExpired:
            problem = f"npm did not answer in {PACK_TIMEOUT_S} s"
            continue
        archives = sorted(into.glob("*.tgz"))
        if done.returncode == 0 and archives:
            return archives[0]
        problem = complaint(done.stderr)
        if problem.startswith(("E404", "ETARGET")):
            break
    raise CallerError(f"[data] package {spec} cannot be fetched: {problem}")


def complaint(text: str) -> str:
    """Return the code and the first message of npm's error output."""
    lines = [re.sub(r"^npm (error|ERR!) ?", "", line).strip() for line in text.splitlines()]
    code = next((line.removeprefix("code ") for line in lines if line.startswith("code ")), "")
    message = next(
        (
            re.sub(r"^(notarget|404) ", "", line)
            for line in lines
            if line and not re.match(r"(code|errno|syscall) |A complete log", line)
        ),
        "",
    )
    message = re.sub(r"https?://\S+", lambda url: url[0].partition("?")[0], message)
    return f"{code}: {message}" if code else message or "npm failed without a message"


def unpack(
    archive: Path, into: Path, max_files: int = MAX_FILES, max_bytes: int = MAX_UNPACKED_BYTES
) -> None:
    """Unpack the regular files of an npm tarball into `into`, without the leading `package/`.

    Skips links and devices. Raises DataError for a path that leaves the folder, for an archive over
    the limits and for one that cannot be read.
    """
    into.mkdir(parents=True)
    root = into.resolve()
    files = total_bytes = 0
    try:
        with gzip.open(archive) as stream:
            for member, source in read_members(stream):
                files, total_bytes = files + 1, total_bytes + member.size
                if files > max_files or total_bytes > max_bytes or member.size > MAX_FILE_BYTES:
                    raise DataError(
                        f"package archive {archive.name} unpacks to more than {max_files} files, "
                        f"{max_bytes} bytes or {MAX_FILE_BYTES} bytes of one file: nothing of it "
                        "is used"
                    )
                if source is None:
                    continue
                path = _path_of(member, root, archive.name)
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("wb") as sink:
                    shutil.copyfileobj(source, sink)
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise DataError(f"package archive {archive.name} cannot be read: {error}") from error


def _path_of(member: tarfile.TarInfo, root: Path, archive: str) -> Path:
    """Return where a member is unpacked. Raises DataError for a path that leaves the folder."""
    parts = Path(member.name).parts[1:]
    path = root.joinpath(*parts)
    if (
        not parts
        or len(parts) > MAX_DEPTH
        or ".." in parts
        or member.name.startswith("/")
        or not path.resolve().is_relative_to(root)
    ):
        raise DataError(
            f"package archive {archive} holds the unsafe path {member.name!r}: "
            "nothing of it is used"
        )
    return path
