"""The Kubernetes objects: built by kustomize, valid by the API's schemas, and in agreement with each other."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from queries import rules
from triton_server import ROOT

OVERLAYS = ("single-gpu", "autoscaled-hpa", "autoscaled-keda")
FOLDER = ROOT / "deploy" / "kubernetes"
SCHEMAS = Path(__file__).parent / "schemas"
REFUSALS = (
    kubernetes_validate.ValidationError,
    kubernetes_validate.utils.SchemaNotFoundError,
    jsonschema.ValidationError,
    FileNotFoundError,
)
OLDEST, NEWEST = "1.27", kubernetes_validate.latest_version()


def builder() -> list[str]:
    """The command that builds an overlay."""
    if shutil.which("kubectl") is not None:
        return ["kubectl", "kustomize"]
    if shutil.which("kustomize") is not None:
        return ["kustomize", "build"]
    pytest.skip("neither kubectl nor kustomize is installed")


@cache
def objects(overlay: str) -> list[dict[str, Any]]:
    return build(FOLDER / "overlays" / overlay)


def build(folder: Path) -> list[dict[str, Any]]:
    done = subprocess.run([*builder(), str(folder)], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def only(overlay: str, kind: str) -> dict[str, Any]:
    (found,) = (item for item in objects(overlay) if item["kind"] == kind)
    return found


def container(overlay: str, name: str) -> dict[str, Any]:
    (found,) = (c for c in only(overlay, "Deployment")["spec"]["template"]["spec"]["containers"] if c["name"] == name)
    return dict(found)


def validate(item: dict[str, Any], version: str) -> None:
    """By Kubernetes' own schema, strictly; for kinds of the operators by ours. A kind without a schema fails."""
    if "." in item["apiVersion"].split("/")[0] and not item["apiVersion"].split("/")[0].endswith(".k8s.io"):
        schema = json.loads((SCHEMAS / f"{item['kind']}.json").read_text())
        jsonschema.Draft202012Validator(schema).validate(item)
    else:
        kubernetes_validate.validate(item, version, strict=True)


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_object_is_valid(overlay: str, version: str) -> None:
    kinds = [item["kind"] for item in objects(overlay)]
    assert {"Deployment", "Service", "ConfigMap", "PodDisruptionBudget", "PodMonitor", "PrometheusRule"} <= set(kinds)
    for item in objects(overlay):
        validate(item, version)


@pytest.mark.parametrize(
    "item",
    [
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "x"}, "spec": {"port": 1}},
        {"apiVersion": "v1", "kind": "Nonsense", "metadata": {"name": "x"}},
        {"apiVersion": "keda.sh/v1alpha1", "kind": "ScaledObject", "metadata": {"name": "x"}, "spec": {"triggers": []}},
        {"apiVersion": "example.com/v1", "kind": "Unknown", "metadata": {"name": "x"}},
    ],
    ids=["unknown field", "unknown kind", "our schema", "no schema"],
)
def test_the_validation_can_fail(item: dict[str, Any]) -> None:
    with pytest.raises(REFUSALS):
        validate(item, OLDEST)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_labels_find_the_pods(overlay: str) -> None:
    labels = only(overlay, "Deployment")["spec"]["template"]["metadata"]["labels"].items()
    assert only(overlay, "Service")["spec"]["selector"].items() <= labels
    for kind in ("Deployment", "PodDisruptionBudget", "PodMonitor"):
        selector = only(overlay, kind)["spec"]["selector"]["matchLabels"].items()
        assert selector and selector <= labels
    ports = {port["name"] for c in ("triton", "openai") for port in container(overlay, c)["ports"]}
    assert {port["targetPort"] for port in only(overlay, "Service")["spec"]["ports"]} <= ports
    assert only(overlay, "PodMonitor")["spec"]["podMetricsEndpoints"][0]["port"] in ports


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_times_are_in_order(overlay: str) -> None:
    """Startup is given more time than the model may take to load, and the end more than draining takes."""
    config = (ROOT / "model_repository" / "morph" / "config.pbtxt").read_text()
    (load_s,) = re.findall(r'START_TIMEOUT_SECONDS" value: \{ string_value: "(\d+)"', config)
    probe = container(overlay, "triton")["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] > int(load_s)
    deployment = only(overlay, "Deployment")["spec"]
    assert deployment["progressDeadlineSeconds"] > probe["periodSeconds"] * probe["failureThreshold"]
    pod = deployment["template"]["spec"]
    settings = only(overlay, "ConfigMap")["data"]
    (_, stop_s) = container(overlay, "triton")["lifecycle"]["preStop"]["exec"]["command"]
    exit_s = 2 + 15 + 5  # what the launcher adds to the drain, at most (supervisor.py)
    assert pod["terminationGracePeriodSeconds"] > int(settings["MORPH_DRAIN_S"]) + int(stop_s) + exit_s


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_pods_are_locked_down_and_have_shared_memory_and_a_gpu(overlay: str) -> None:
    pod = only(overlay, "Deployment")["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"]
    for name in ("triton", "openai"):
        context = container(overlay, name)["securityContext"]
        assert context["readOnlyRootFilesystem"] and context["capabilities"] == {"drop": ["ALL"]}
    mounts = {m["mountPath"]: m["name"] for m in container(overlay, "triton")["volumeMounts"]}
    (shm,) = (v for v in pod["volumes"] if v["name"] == mounts["/dev/shm"])
    assert shm["emptyDir"] == {"medium": "Memory", "sizeLimit": "1Gi"}
    assert container(overlay, "triton")["resources"]["limits"]["nvidia.com/gpu"] == "1"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_containers_have_what_they_need(overlay: str) -> None:
    """Weights of 8 billion parameters fit the host's memory; a worker for the share of a processor; no file is lost."""
    triton, openai = container(overlay, "triton"), container(overlay, "openai")
    assert triton["resources"]["requests"]["memory"] == "24Gi"
    assert {"name": "MORPH_OPENAI_WORKERS", "value": openai["resources"]["requests"]["cpu"]} in openai["env"]
    assert Path(only(overlay, "ConfigMap")["data"]["MORPH_COST_CACHE"]).is_relative_to("/tmp")
    secrets = [source["secretRef"] for source in triton["envFrom"] if "secretRef" in source]
    assert secrets == [{"name": "morphserve-secrets", "optional": True}]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_example_of_the_docs_can_be_applied(tmp_path: Path, overlay: str) -> None:
    text = (ROOT / "docs" / "deploy.md").read_text()
    (example,) = (block for block in re.findall(r"```yaml\n(.*?)```", text, re.S) if "kind: Kustomization" in block)
    (tmp_path / "morphserve").symlink_to(ROOT)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "kustomization.yaml").write_text(example.replace("overlays/single-gpu", f"overlays/{overlay}"))
    found = {item["kind"]: item for item in build(tmp_path / "mine")}
    for item in found.values():
        validate(item, OLDEST)
        assert item["metadata"]["namespace"] == "morphserve"
        assert item["metadata"]["labels"]["release"] == "kube-prometheus-stack"
    given = found["ConfigMap"]["data"]
    assert given == only(overlay, "ConfigMap")["data"] | {"MORPH_MEMORY_BUDGET_GIB": "24", "MORPH_TTFT_SLO_S": "1.5"}
    for part in found["Deployment"]["spec"]["template"]["spec"]["containers"]:
        assert part["image"] == "registry.example/morphserve-triton:1"
        assert {"configMapRef": {"name": found["ConfigMap"]["metadata"]["name"]}} in part["envFrom"]
    if overlay == "autoscaled-keda":
        assert all(
            'namespace="morphserve"' in t["metadata"]["query"] for t in found["ScaledObject"]["spec"]["triggers"]
        )


def test_one_thing_scales_at_a_time() -> None:
    for overlay in OVERLAYS:
        kinds = {item["kind"] for item in objects(overlay)}
        scalers = kinds & {"HorizontalPodAutoscaler", "ScaledObject"}
        wanted = {"autoscaled-hpa": {"HorizontalPodAutoscaler"}, "autoscaled-keda": {"ScaledObject"}}
        assert scalers == wanted.get(overlay, set())
        assert ("replicas" in only(overlay, "Deployment")["spec"]) == (not scalers), "replicas are the scaler's"


def test_the_alerts_are_those_of_compose() -> None:
    (groups,) = (item["spec"]["groups"] for item in objects("single-gpu") if item["kind"] == "PrometheusRule")
    assert [rule for group in groups for rule in group["rules"]] == rules()


def test_keda_takes_the_fallback() -> None:
    """Before 2.18 it is refused beside another metric type."""
    scaled = only("autoscaled-keda", "ScaledObject")["spec"]
    assert scaled["fallback"] and {trigger["metricType"] for trigger in scaled["triggers"]} == {"AverageValue"}


def test_the_scalers_read_what_the_rules_record() -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    metrics = only("autoscaled-hpa", "HorizontalPodAutoscaler")["spec"]["metrics"]
    names = {metric["pods"]["metric"]["name"] for metric in metrics}
    assert names - recorded == {"nv_inference_pending_request_count"}
    queries = " ".join(t["metadata"]["query"] for t in only("autoscaled-keda", "ScaledObject")["spec"]["triggers"])
    assert set(re.findall(r"morphserve:[\w:]+", queries)) <= recorded
