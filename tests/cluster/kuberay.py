"""What is asked of a manifest: KubeRay's schema, read strictly, and the rules of its operator."""

from __future__ import annotations

import copy
import gzip
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import yaml

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
CRDS = ROOT / "tests/assets/crds"
MANIFESTS = sorted(path.name for path in CLUSTER.glob("ray*.yaml"))
CLUSTER_SPEC = {"RayCluster": (), "RayJob": ("rayClusterSpec",), "RayService": ("rayClusterConfig",)}
"""Where a kind keeps its RayCluster spec."""
LONGEST_NAME = {"RayCluster": 53, "RayJob": 47, "RayService": 47}
ALPHA_FIELDS = ("networkPolicy", "tlsOptions", "historyServerOptions")
"""Parts of a RayCluster spec that an operator with default feature gates refuses."""
RAY_DRAINS_S = 30
"""Ray's own RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S."""
RUNTIME_ENV = CLUSTER / "runtime_env.yaml"


def manifest(name: str) -> dict[str, Any]:
    """Return the one resource of cluster/`name`, free to be changed."""
    return copy.deepcopy(_read(name))


@cache
def _read(name: str) -> dict[str, Any]:
    return yaml.load((CLUSTER / name).read_text(), yaml.CSafeLoader)


def cluster_spec(resource: dict[str, Any]) -> dict[str, Any]:
    spec = resource["spec"]
    for key in CLUSTER_SPEC[resource["kind"]]:
        spec = spec[key]
    return spec


def pods(spec: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Yield (group name, group, pod spec) of the head and of every worker group."""
    yield "head", spec["headGroupSpec"], spec["headGroupSpec"]["template"]["spec"]
    for group in spec["workerGroupSpecs"]:
        yield group["groupName"], group, group["template"]["spec"]


def env(container: dict[str, Any]) -> dict[str, str]:
    return {variable["name"]: variable.get("value", "") for variable in container.get("env", [])}


def most_gpus(resource: dict[str, Any], *, but_not: str = "no such market") -> int:
    """Return how many GPUs the groups may have together, at one or more a pod."""
    return sum(
        group["maxReplicas"] * int(pod["containers"][0]["resources"]["limits"].get("nvidia.com/gpu", "0"))
        for group_name, group, pod in pods(cluster_spec(resource))
        if group_name != "head" and group["labels"]["ray.io/market-type"] != but_not
    )


def runtime_env(source: str) -> dict[str, Any]:
    text = RUNTIME_ENV.read_text() if source == RUNTIME_ENV.name else _read(source)["spec"]["runtimeEnvYAML"]
    return yaml.load(text, yaml.CSafeLoader)


def serve_config() -> dict[str, Any]:
    return yaml.load(_read("rayservice.yaml")["spec"]["serveConfigV2"], yaml.CSafeLoader)


# --- the schema, made strict


def schema_complaints(resource: dict[str, Any]) -> list[str]:
    errors = jsonschema.Draft202012Validator(_strict_schema(resource["kind"])).iter_errors(resource)
    return sorted(f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in errors)


@cache
def _strict_schema(kind: str) -> dict[str, Any]:
    schema = json.loads(gzip.decompress((CRDS / f"{kind.lower()}s.json.gz").read_bytes()))
    schema["required"] = ["apiVersion", "kind", "metadata", "spec"]
    schema["properties"]["apiVersion"] = {"const": "ray.io/v1"}
    schema["properties"]["kind"] = {"const": kind}
    return _strict(schema)


def _strict(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON schema for what a person may write; Kubernetes itself drops what it does not know."""
    if schema.get("x-kubernetes-int-or-string"):
        return {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    strict = {key: value for key, value in schema.items() if not key.startswith("x-kubernetes-")}
    if "properties" in schema:
        strict["properties"] = {key: _strict(value) for key, value in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            strict["additionalProperties"] = False
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            strict[key] = _strict(schema[key])
    return strict


# --- what the operator checks after the schema


def operator_complaints(resource: dict[str, Any]) -> list[str]:
    kind, spec = resource["kind"], resource["spec"]
    complaints = _name_complaints(kind, resource["metadata"]["name"])
    if kind == "RayJob":
        complaints += _job_complaints(spec)
    if kind != "RayCluster" and "upgradeStrategy" in cluster_spec(resource):
        complaints.append("upgradeStrategy is for a RayCluster that stands alone")
    if kind != "RayCluster" and cluster_spec(resource).get("authOptions", {}).get("enableK8sTokenAuth"):
        complaints.append("enableK8sTokenAuth is for a RayCluster that stands alone")
    return complaints + _cluster_complaints(cluster_spec(resource))


def _name_complaints(kind: str, name: str) -> list[str]:
    complaints = []
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        complaints.append(f"{name!r} is not a DNS-1035 name")
    if len(name) > LONGEST_NAME[kind]:
        complaints.append(f"{name!r} is longer than {LONGEST_NAME[kind]} characters")
    return complaints


def _job_complaints(spec: dict[str, Any]) -> list[str]:
    complaints = []
    interactive = spec.get("submissionMode") == "InteractiveMode"
    if ("rayClusterSpec" in spec) == ("clusterSelector" in spec):
        complaints.append("a RayJob needs either rayClusterSpec or clusterSelector")
    if not spec.get("entrypoint") and not interactive:
        complaints.append("a RayJob needs an entrypoint")
    for field in ("ttlSecondsAfterFinished", "suspend"):
        if spec.get(field) and not spec.get("shutdownAfterJobFinishes"):
            complaints.append(f"{field} needs shutdownAfterJobFinishes")
    if spec.get("backoffLimit") and ("clusterSelector" in spec or interactive):
        complaints.append("backoffLimit needs a cluster that the job makes itself")
    if "deletionRules" in spec.get("deletionStrategy", {}) and spec.get("shutdownAfterJobFinishes"):
        complaints.append("deletionRules and shutdownAfterJobFinishes exclude each other")
    if spec.get("submissionMode") == "SidecarMode" and {"submitterPodTemplate", "submitterConfig"} & set(spec):
        complaints.append("SidecarMode has no submitter to configure")
    return complaints


def _cluster_complaints(spec: dict[str, Any]) -> list[str]:
    ray = tuple(int(part) for part in spec.get("rayVersion", "0.0").split(".")[:2])
    options = spec.get("autoscalerOptions", {})
    autoscaler = (
        options.get("version", "v2" if ray >= (2, 47) else "v1") if spec.get("enableInTreeAutoscaling") else ""
    )

    complaints = [f"{field} is behind a feature gate" for field in ALPHA_FIELDS if field in spec]
    if spec.get("gcsFaultToleranceOptions", {}).get("backend") == "rocksdb":
        complaints.append("gcsFaultToleranceOptions.backend is behind a feature gate")
    if spec.get("authOptions", {}).get("mode") == "token" and ray < (2, 52):
        complaints.append("token authentication needs Ray 2.52")

    group_names = [group["groupName"] for group in spec["workerGroupSpecs"]]
    complaints += [f"group {name} appears twice" for name in set(group_names) if group_names.count(name) > 1]
    for group_name, group, pod in pods(spec):
        complaints += [
            f"{group_name} {complaint}" for complaint in _group_complaints(group, pod, autoscaler, options)
        ]
        if "priority" in group and ray < (2, 56):
            complaints.append(f"{group_name} priority needs Ray 2.56")
    return complaints


def _group_complaints(
    group: dict[str, Any], pod: dict[str, Any], autoscaler: str, options: dict[str, Any]
) -> list[str]:
    complaints = []
    if not pod["containers"]:
        complaints.append("has no container")
    least, most = group.get("minReplicas", 0), group.get("maxReplicas", 0)
    if not 0 <= least <= group.get("replicas", least) <= most:
        complaints.append("minReplicas, replicas and maxReplicas are not in order")
    if autoscaler == "v2" and pod.get("restartPolicy", "Never") != "Never":
        complaints.append("restartPolicy must be Never or unset with autoscaler v2")
    for field in ("idleTimeoutSeconds", "priority"):
        if field in group and autoscaler != "v2":
            complaints.append(f"{field} needs autoscaler v2")
    if any("RAY_enable_autoscaler_v2" in env(container) for container in pod["containers"]) and "version" in options:
        complaints.append("RAY_enable_autoscaler_v2 and autoscalerOptions.version exclude each other")
    start = group.get("rayStartParams", {})
    if {"num-cpus", "num-gpus", "memory", "resources"} & set(start) and "resources" in group:
        complaints.append("resources stand in the group and in rayStartParams")
    if "labels" in start:
        complaints.append("labels belong into the group's top-level labels")
    return complaints
