"""The bill of materials has what CycloneDX 1.6 requires, and every pinned package once."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import sbom


@pytest.fixture(scope="module")
def bill() -> dict[str, Any]:
    return json.loads(json.dumps(sbom.bill()))


def test_it_has_the_fields_that_the_specification_requires(bill: dict[str, Any]) -> None:
    assert bill["bomFormat"] == "CycloneDX" and bill["specVersion"] == "1.6"
    uuid = r"urn:uuid:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
    assert re.fullmatch(uuid, bill["serialNumber"]) and bill["version"] >= 1
    for component in (bill["metadata"]["component"], *bill["components"]):
        assert component["type"] in ("application", "library") and component["name"]
        assert re.fullmatch(r"pkg:pypi/[a-z0-9]+(-[a-z0-9]+)*@[^@/?#]+", component["purl"])
        kinds = [set(choice) for choice in component["licenses"]]
        assert kinds == [{"expression"}] or all(kind == {"license"} for kind in kinds)
        assert all(
            set(choice["license"]) <= {"id", "name"} and len(choice["license"]) == 1
            for choice in component["licenses"]
            if "license" in choice
        )


def test_every_pinned_package_stands_in_it_once_and_requires_only_those(
    bill: dict[str, Any],
) -> None:
    pinned = sbom.pins()
    listed = [(component["name"], component["version"]) for component in bill["components"]]
    assert sorted(listed) == sorted(pinned.values()) and len(pinned) > 200
    refs = {component["bom-ref"] for component in bill["components"]}
    refs.add(bill["metadata"]["component"]["bom-ref"])
    assert len(refs) == len(pinned) + 1
    assert {entry["ref"] for entry in bill["dependencies"]} == refs
    assert all(set(entry["dependsOn"]) <= refs for entry in bill["dependencies"])


def test_what_only_development_needs_is_optional(bill: dict[str, Any]) -> None:
    scopes = {component["name"].lower(): component["scope"] for component in bill["components"]}
    assert {scopes[name] for name in ("torch", "ray", "prefect", "fastapi")} == {"required"}
    assert {scopes[name] for name in ("pytest", "schemathesis", "mypy")} == {"optional"}


def test_the_command_writes_the_same_file_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [tmp_path / "out" / "one.json", tmp_path / "two.json"]
    for file in files:
        monkeypatch.setattr("sys.argv", ["sbom", str(file)])
        assert sbom.main() == 0
    assert files[0].read_bytes() == files[1].read_bytes()


def test_every_pinned_package_has_hashes() -> None:
    text = (sbom.HERE / "constraints.hashes.txt").read_text().replace("\\\n", " ")
    rows = [line.split() for line in text.splitlines()]
    pinned = [f"{name}=={version}" for name, (_, version) in sbom.pins().items()]
    assert sorted(row[0] for row in rows) == sorted(pinned), "run `make hashes`"
    assert all(
        len(row) > 1 and all(re.fullmatch("--hash=sha256:[0-9a-f]{64}", part) for part in row[1:])
        for row in rows
    )
