"""Who may command Prefect servers that we start: nobody without the token, no page of another site,
and no run through job variables.
"""

import json
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from flows.scheduling.prefect_app import HOSTS, TOKEN, create_app
from flows.scheduling.prefect_server import _lasting_token, loopback_without_proxy
from tests.helpers.browser import CHROMIUM, Browser
from tests.helpers.ray_cluster import HERE
from tests.helpers.s3_server import free_ports

slow = pytest.mark.slow
# Prefect reads its settings when it is imported, so each server has a process of its own.
LASTING = """
import json, sys
from pathlib import Path
from flows.scheduling.prefect_server import lasting_server

home = Path(sys.argv[1])
with lasting_server(home, int(sys.argv[2])):
    from flows.scheduling import deployments
    parameters = {"recipe": "quickstart", "root": str(home / "root"), "name": "nightly"}
    made = deployments.deploy(deployments.Plan("nightly", parameters, home, every_s=86400, paused=True), "http://127.0.0.1:9/hook")
    print(json.dumps(made), flush=True)
    sys.stdin.read()
"""  # noqa: E501
PRIVATE = """
import json, os, sys
from pathlib import Path
import httpx
from flows.scheduling.prefect_server import prefect_server

before = dict(os.environ)
with prefect_server(Path(sys.argv[1])) as url:
    from prefect.client.orchestration import get_client
    with get_client(sync_client=True) as client:
        flow = client.create_flow_from_name("ours")
        flows = [flow.name for flow in client.read_flows()]
    stranger = httpx.post(f"{url}/flows/filter", json={}).status_code
    from pathlib import Path
    commands = b"".join(path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline"))
    is_hidden = os.environ["PREFECT_API_AUTH_STRING"].encode() not in commands
after = {name: value for name, value in os.environ.items() if name in before}
print(json.dumps({"flows": flows, "stranger": stranger, "is_hidden": is_hidden, "is_restored": after == before}))
"""  # noqa: E501
CONFIGURATION = """
import asyncio, json, sys
from prefect.client.orchestration import get_client
from prefect.workers.process import ProcessJobConfiguration

async def main():
    async with get_client() as client:
        pool = await client.read_work_pool("unclip")
        made = await ProcessJobConfiguration.from_template_and_values(pool.base_job_template, json.loads(sys.argv[1]), client=client)
        print(json.dumps({"command": made.command, "env": made.env, "working_dir": made.working_dir}))

asyncio.run(main())
"""  # noqa: E501
FORGED = {"command": "touch forged", "env": {"LD_PRELOAD": "forged.so"}, "working_dir": "/"}


@dataclass
class Server:
    """A lasting server with one deployment."""

    home: Path
    url: str
    deployment: dict[str, Any]

    def password(self) -> str:
        return (self.home / "password").read_text().strip()

    def client(self) -> httpx.Client:
        user, _, password = self.password().partition(":")
        return httpx.Client(base_url=f"{self.url}/api", auth=(user, password), timeout=60)

    def runs(self) -> list[dict[str, Any]]:
        with self.client() as client:
            found: list[dict[str, Any]] = (
                client.post("/flow_runs/filter", json={}).raise_for_status().json()
            )
        return found


def environment(**more: str) -> dict[str, str]:
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")
    }
    return inherited | {"PYTHONPATH": str(HERE)} | more


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("prefect")
    port = free_ports(1)[0]
    command = [sys.executable, "-c", LASTING, str(home), str(port)]
    with subprocess.Popen(
        command,
        cwd=home,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            assert process.stdout
            yield Server(home, f"http://127.0.0.1:{port}", json.loads(process.stdout.readline()))
            process.communicate("", timeout=60)
        finally:
            process.kill()


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[str]:
    """A site of another origin with an empty page."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.html").write_text("<!doctype html><title>elsewhere</title>")
    with ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "site"))
    ) as site:
        thread = threading.Thread(
            target=site.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True
        )
        thread.start()
        yield f"http://127.0.0.1:{site.server_address[1]}/"
        site.shutdown()
        thread.join()


@slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_page_of_another_origin_reads_nothing_and_starts_nothing_though_it_has_the_token(
    server: Server, elsewhere: str, tmp_path: Path
) -> None:
    create = f"{server.url}/api/deployments/{server.deployment['id']}/create_flow_run"
    body = json.dumps({"job_variables": {"command": "touch forged"}})
    login = f"'Basic ' + btoa({server.password()!r})"
    attempts = [
        f"fetch('{server.url}/api/deployments/filter', "
        f"{{method: 'POST', body: '{{}}', headers: {{'Content-Type': 'application/json'}}}})",
        f"fetch('{server.url}/api/deployments/filter', "
        f"{{method: 'POST', body: '{{}}', headers: {{Authorization: {login}}}}})",
        f"fetch('{create}', "
        f"{{method: 'POST', body: '{body}', headers: {{Authorization: {login}}}}})",
        f"fetch('{create}', {{method: 'POST', body: '{body}', mode: 'no-cors'}}).then((answer) => "
        f"answer.text())",
        f"fetch('{server.url}/api/health').then((answer) => answer.text())",
    ]
    socket = f"new WebSocket('{server.url.replace('http', 'ws')}/api/events/out', ['prefect'])"
    with Browser(tmp_path / "browser") as browser:
        browser.go(elsewhere)
        for attempt in attempts:
            assert browser.run(
                f"{attempt}.then((answer) => answer ? 'answered' : 'nothing', () => 'refused')"
            ) in ("refused", "nothing")
        opened = f"new Promise((settle) => {{const ws = {socket}; ws.onopen = () => settle('open'); ws.onerror = () => settle('refused')}})"  # noqa: E501
        assert browser.run(opened) == "refused"
        # Prefect's own page can do all of it, once the person has typed the password.
        browser.go(server.url)
        ask = f"fetch('/api/deployments/filter', {{method: 'POST', body: '{{}}', headers: {{Authorization: {login}}}}})"  # noqa: E501
        assert (
            browser.run(f"{ask}.then((answer) => answer.json()).then((found) => found[0].name)")
            == "nightly"
        )
        assert browser.run(opened) == "open"
    assert server.runs() == []


@slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_person_opens_the_page_with_the_password_in_the_file(
    server: Server, tmp_path: Path
) -> None:
    password = server.home / "password"
    assert stat.S_IMODE(password.stat().st_mode) == 0o600
    with Browser(tmp_path / "browser") as browser:
        browser.go(server.url)
        browser.until("Boolean(document.querySelector('input[type=password]'))")
        browser.run("document.querySelector('input[type=password]').focus()")
        browser.tell("Input.insertText", text=server.password())
        browser.press("Enter", "\r")
        browser.until(
            "document.body.innerText.includes('Dashboard') && "
            "!document.querySelector('input[type=password]')"
        )
        browser.go(f"{server.url}/deployments")
        browser.until("document.body.innerText.includes('nightly')")


@slow
@pytest.mark.timeout(300)
def test_only_who_has_the_token_and_asks_at_the_servers_own_address_is_answered(
    server: Server,
) -> None:
    with server.client() as client:
        assert client.post("/deployments/filter", json={}).status_code == 200
        assert (
            client.post("/deployments/filter", json={}, auth=("unclip", "guessed")).status_code
            == 401
        )
        assert httpx.post(f"{server.url}/api/deployments/filter", json={}).status_code == 401
        for host in (
            "evil.example",
            "evil.example:4200",
            f"{server.url.removeprefix('http://')}.evil.example",
        ):
            refused = client.post("/deployments/filter", json={}, headers={"Host": host})
            assert refused.status_code == 403 and server.url.removeprefix("http://") in refused.text
        for origin in ("null", "http://evil.example", "http://127.0.0.1"):
            assert (
                client.post("/deployments/filter", json={}, headers={"Origin": origin}).status_code
                == 403
            )
        assert (
            client.post("/deployments/filter", json={}, headers={"Origin": server.url}).status_code
            == 200
        )


@slow
@pytest.mark.timeout(300)
def test_a_deployment_takes_no_job_variables(server: Server) -> None:
    """The server refuses them; where it does not look (a run made apart from its deployment), the
    worker leaves them out.
    """
    with server.client() as client:
        path = f"/deployments/{server.deployment['id']}/create_flow_run"
        for name, value in FORGED.items():
            refused = client.post(path, json={"job_variables": {name: value}})
            assert refused.status_code == 422 and name in refused.text
    variables = {
        "PREFECT_API_URL": f"{server.url}/api",
        "PREFECT_API_AUTH_STRING": server.password(),
        "PREFECT_HOME": str(server.home),
    }
    command = [sys.executable, "-c", CONFIGURATION, json.dumps(FORGED)]
    done = subprocess.run(
        command, env=environment(**variables), cwd=server.home, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"command": None, "env": {}, "working_dir": None}
    assert server.runs() == []


@slow
@pytest.mark.timeout(300)
def test_a_private_server_takes_nothing_of_prefects_from_the_environment_and_needs_no_proxy(
    tmp_path: Path,
) -> None:
    theirs = {
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{tmp_path / 'theirs.db'}",
        "PREFECT_SERVER_API_AUTH_STRING": "their:password",
        "PREFECT_API_AUTH_STRING": "their:password",
        "PREFECT_API_KEY": "theirs",
        "PREFECT_PROFILE": "theirs",
        "PREFECT_CLIENT_CUSTOM_HEADERS": '{"Authorization": "theirs"}',
        "http_proxy": "http://127.0.0.1:9",
        "no_proxy": "intranet.example",
    }
    (tmp_path / ".env").write_text(
        f"PREFECT_SERVER_API_BASE_PATH=/theirs\nPREFECT_HOME={tmp_path / 'theirs'}\n"
    )
    home = tmp_path / "home?timeout=0#1"  # a URL with this in it would name another file
    command = [sys.executable, "-c", PRIVATE, str(home)]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment(**theirs),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == {
        "flows": ["ours"],
        "stranger": 401,
        "is_hidden": True,
        "is_restored": True,
    }
    assert (home / "prefect.db").exists() and not (tmp_path / "home").exists()
    assert not (tmp_path / "theirs.db").exists() and not (tmp_path / "theirs").exists()


@pytest.mark.parametrize("lacking", [HOSTS, TOKEN])
def test_a_server_without_token_or_addresses_does_not_start(
    lacking: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {HOSTS: "127.0.0.1:4200", TOKEN: "unclip:token"}.items():
        monkeypatch.setenv(name, "" if name == lacking else value)
    with pytest.raises(ValueError, match=lacking):
        create_app()


def test_a_token_is_kept_as_long_as_only_its_user_could_read_it(tmp_path: Path) -> None:
    file = tmp_path / "password"
    token = _lasting_token(file)
    assert file.read_text() == f"{token}\n" and stat.S_IMODE(file.stat().st_mode) == 0o600
    assert _lasting_token(file) == token
    file.chmod(0o640)
    renewed = _lasting_token(file)
    assert renewed != token and stat.S_IMODE(file.stat().st_mode) == 0o600
    (tmp_path / "theirs").write_text(file.read_text())
    file.unlink()
    file.symlink_to(tmp_path / "theirs")
    assert _lasting_token(file) != renewed and not file.is_symlink()
    file.write_text("")
    assert len(_lasting_token(file)) > 40


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ({}, "127.0.0.1,localhost,::1"),
        ({"no_proxy": "intranet.example, localhost"}, "intranet.example,localhost,127.0.0.1,::1"),
        ({"NO_PROXY": "intranet.example"}, "intranet.example,127.0.0.1,localhost,::1"),
        ({"no_proxy": "*"}, "*"),
    ],
)
def test_loopback_joins_the_hosts_that_need_no_proxy(listed: dict[str, str], expected: str) -> None:
    assert loopback_without_proxy(listed) == {"no_proxy": expected, "NO_PROXY": expected}
