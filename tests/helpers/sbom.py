"""Writes a software bill of materials (CycloneDX 1.6, JSON): `python -m tests.helpers.sbom FILE`.

Lists every package of constraints.txt with its licence and what it requires, as far as it is
installed. Packages that only the extra `dev` requires are optional. Equal environments give equal
files: there is no time in it.
"""

import json
import sys
import tomllib
import uuid
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).parents[2]
MAX_LICENCE_CHARS = 60
"""Longer values of the field License are whole texts."""


def pins() -> dict[str, tuple[str, str]]:
    """Return name and version of every pinned package by its canonical name."""
    lines = (HERE / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {str(canonicalize_name(name)): (name, version) for name, version in pairs}


def requirements(lines: Iterable[str], extra: str = "") -> set[str]:
    """Return the canonical names of the requirements that hold in this environment."""
    parsed = [Requirement(line) for line in lines]
    return {
        str(canonicalize_name(each.name))
        for each in parsed
        if each.marker is None or each.marker.evaluate({"extra": extra})
    }


def closure(names: Iterable[str], requires: Mapping[str, set[str]]) -> set[str]:
    """Return packages with all that they require, directly or not."""
    reached: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += requires.get(name, set())
    return reached


def licences(name: str) -> list[dict[str, Any]]:
    """Return a package's licences as CycloneDX has them; none where it names none."""
    try:
        facts = metadata.metadata(name)
    except metadata.PackageNotFoundError:
        return []
    if expression := facts.get("License-Expression"):
        return [{"expression": expression}]
    classifiers = facts.get_all("Classifier") or []
    names = [text.rpartition(" :: ")[2] for text in classifiers if text.startswith("License :: ")]
    free_text = (facts.get("License") or "").strip()
    if not names and free_text and len(free_text) <= MAX_LICENCE_CHARS:
        names = [free_text]
    return [{"license": {"name": text}} for text in dict.fromkeys(names)]


def installed_requirements(name: str) -> set[str]:
    """Return what an installed package requires; nothing where it is not installed."""
    try:
        return requirements(metadata.requires(name) or ())
    except metadata.PackageNotFoundError:
        return set()


def bill() -> dict[str, Any]:
    """Return the bill of materials."""
    project = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]
    pinned = pins()
    direct = requirements(project["dependencies"]) & pinned.keys()
    requires = {name: installed_requirements(name) & pinned.keys() for name in pinned}
    required = closure(direct, requires)
    refs = {name: f"pkg:pypi/{name}@{version}" for name, (_, version) in pinned.items()}
    ours = f"pkg:pypi/{project['name']}@{project['version']}"
    components = [
        {
            "type": "library",
            "bom-ref": refs[name],
            "name": written,
            "version": version,
            "scope": "required" if name in required else "optional",
            "purl": refs[name],
            "licenses": licences(name),
        }
        for name, (written, version) in sorted(pinned.items())
    ]
    depends = {ours: direct} | {refs[name]: requires[name] for name in sorted(pinned)}
    root = {
        "type": "application",
        "bom-ref": ours,
        "name": project["name"],
        "version": project["version"],
        "purl": ours,
        "licenses": [{"license": {"id": project["license"]}}],
    }
    content = {
        "metadata": {"component": root},
        "components": components,
        "dependencies": [
            {"ref": ref, "dependsOn": sorted(refs[name] for name in names)}
            for ref, names in depends.items()
        ],
    }
    serial = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(content, sort_keys=True))
    head = {"bomFormat": "CycloneDX", "specVersion": "1.6"}
    return {**head, "serialNumber": serial.urn, "version": 1, **content}


def main() -> int:
    """Write the file that the command line names."""
    file = Path(sys.argv[1])
    file.parent.mkdir(parents=True, exist_ok=True)
    content = bill()
    file.write_text(json.dumps(content, indent=1) + "\n")
    print(f"{file}: {len(content['components'])} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
