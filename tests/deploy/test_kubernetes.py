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
    done = subprocess.run([*builder(), str(FOLDER / "overlays" / overlay)], capture_output=True, text=True)
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
    pod = only(overlay, "Deployment")["spec"]["template"]["spec"]
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


def test_the_scalers_read_what_the_rules_record() -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    metrics = only("autoscaled-hpa", "HorizontalPodAutoscaler")["spec"]["metrics"]
    names = {metric["pods"]["metric"]["name"] for metric in metrics}
    assert names - recorded == {"nv_inference_pending_request_count"}
    queries = " ".join(t["metadata"]["query"] for t in only("autoscaled-keda", "ScaledObject")["spec"]["triggers"])
    assert set(re.findall(r"morphserve:[\w:]+", queries)) <= recorded
