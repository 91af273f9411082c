"""The manifests of cluster/, held against everything that can be asked without a Kubernetes cluster.

schema     KubeRay's own (tests/assets/crds), made strict: what the API server drops in silence is an error
operator   the rules KubeRay's operator checks after the schema
Ray        its autoscaler's reader, ServeDeploySchema, RuntimeEnv and the packer of working directories
ours       drain before death, one version everywhere, entrypoints that exist, one token, the same mounts
"""

import re
import shlex
import shutil
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.kuberay import (
    CLUSTER,
    MANIFESTS,
    RAY_DRAINS_S,
    ROOT,
    RUNTIME_ENV,
    cluster_spec,
    env,
    manifest,
    most_gpus,
    operator_complaints,
    pods,
    runtime_env,
    schema_complaints,
    serve_config,
)

every_manifest = pytest.mark.parametrize("name", MANIFESTS)


# --- schema


@every_manifest
def test_manifest_has_no_field_that_kuberay_does_not_know(name: str) -> None:
    assert schema_complaints(manifest(name)) == []


def test_an_int_start_parameter_and_a_misspelt_group_field_are_both_reported() -> None:
    wrong = manifest("raycluster.yaml")
    wrong["spec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0
    wrong["spec"]["workerGroupSpecs"][0]["maxReplica"] = 4
    int_complaint, name_complaint = schema_complaints(wrong)
    assert "rayStartParams.num-cpus: 0 is not of type 'string'" in int_complaint
    assert "'maxReplica' was unexpected" in name_complaint


def test_a_field_misspelt_deep_inside_a_pod_is_reported() -> None:
    wrong = manifest("rayservice.yaml")
    container = wrong["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    container["securityContext"] = {"allowPrivilegeEscalations": False}
    (complaint,) = schema_complaints(wrong)
    assert "'allowPrivilegeEscalations' was unexpected" in complaint


# --- operator


@every_manifest
def test_manifest_passes_the_rules_of_the_operator(name: str) -> None:
    assert operator_complaints(manifest(name)) == []


@pytest.mark.parametrize(
    ("name", "path", "value", "complaint"),
    [
        ("raycluster.yaml", "metadata.name", "9lives", "is not a DNS-1035 name"),
        ("rayservice.yaml", "metadata.name", "a" * 48, "is longer than 47"),
        (
            "raycluster.yaml",
            "spec.workerGroupSpecs.0.minReplicas",
            99,
            "minReplicas, replicas and maxReplicas",
        ),
        ("raycluster.yaml", "spec.workerGroupSpecs.1.groupName", "cpu", "appears twice"),
        ("raycluster.yaml", "spec.headGroupSpec.template.spec.containers", [], "head has no container"),
        ("raycluster.yaml", "spec.headGroupSpec.template.spec.restartPolicy", "Always", "restartPolicy"),
        ("raycluster.yaml", "spec.autoscalerOptions.version", "v1", "priority needs autoscaler v2"),
        ("raycluster.yaml", "spec.rayVersion", "2.51.0", "token authentication needs Ray 2.52"),
        ("raycluster.yaml", "spec.tlsOptions", {"enabled": True}, "tlsOptions is behind a feature gate"),
        ("raycluster.yaml", "spec.workerGroupSpecs.0.rayStartParams", {"labels": "a=b"}, "top-level labels"),
        ("rayjob-finetune.yaml", "spec.shutdownAfterJobFinishes", False, "ttlSecondsAfterFinished needs"),
        ("rayjob-finetune.yaml", "spec.clusterSelector", {"ray.io/cluster": "a"}, "either rayClusterSpec or"),
        (
            "rayservice.yaml",
            "spec.rayClusterConfig.upgradeStrategy",
            {"type": "None"},
            "upgradeStrategy is for",
        ),
    ],
)
def test_the_rules_of_the_operator_catch(name: str, path: str, value: Any, complaint: str) -> None:
    wrong = manifest(name)
    *parents, leaf = path.split(".")
    place: Any = wrong
    for key in parents:
        place = place[int(key)] if isinstance(place, list) else place[key]
    place[leaf] = value
    assert complaint in "\n".join(operator_complaints(wrong))


# --- Ray


@every_manifest
def test_rays_autoscaler_sees_an_empty_head_and_gpus_where_they_are_meant(name: str) -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    cluster = {"metadata": {"name": "any", "namespace": "any"}, "spec": cluster_spec(manifest(name))}
    node_types = _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
    head = node_types.pop("headgroup")
    assert head["resources"]["CPU"] == 0
    assert head["resources"].get("GPU", 0) == 0
    for group_name, node_type in node_types.items():
        assert node_type["resources"]["CPU"] > 0
        assert ("gpu" in group_name) == (node_type["resources"].get("GPU", 0) > 0)
        assert ("spot" in group_name) == (node_type["labels"]["ray.io/market-type"] == "spot")


def test_spot_is_asked_for_before_on_demand() -> None:
    for name in ("raycluster.yaml", "rayjob-finetune.yaml"):
        groups = {group["groupName"]: group for group in cluster_spec(manifest(name))["workerGroupSpecs"]}
        assert groups["gpu-spot"]["priority"] > groups["gpu-on-demand"]["priority"]


def test_serve_config_is_one_that_serve_accepts() -> None:
    from ray.serve.schema import ServeDeploySchema

    config = ServeDeploySchema.model_validate(serve_config())
    (application,) = config.applications
    assert application.import_path == "serving.app:build"
    assert set(application.args) == {"model", "quant"}
    assert (config.http_options.host, config.http_options.port) == ("0.0.0.0", 8000)


def test_a_misspelt_field_of_the_serve_config_is_refused() -> None:
    from pydantic import ValidationError
    from ray.serve.schema import ServeDeploySchema

    wrong = serve_config()
    wrong["applications"][0]["import_pth"] = wrong["applications"][0].pop("import_path")
    with pytest.raises(ValidationError, match="import_p"):
        ServeDeploySchema.model_validate(wrong)


@pytest.mark.parametrize("source", [RUNTIME_ENV.name, *(name for name in MANIFESTS if name.startswith("rayjob"))])
def test_runtime_env_is_one_that_ray_accepts(source: str) -> None:
    from ray.runtime_env import RuntimeEnv

    fields = runtime_env(source)
    assert set(fields) <= RuntimeEnv.known_fields
    assert dict(RuntimeEnv(**fields)["env_vars"]) == fields["env_vars"]
    assert "DS_ACCELERATOR" not in fields["env_vars"], "each worker finds out what it runs on"


def test_uploaded_code_is_complete_and_carries_no_ballast(tmp_path: Path) -> None:
    from ray._private.runtime_env.packaging import create_package

    code = [
        "jobs/finetune.py",
        "serving/app.py",
        "platform/rayllava/data/plan.py",
        "cluster/runtime_env.yaml",
    ]
    ballast = [
        *(".git/config", ".venv/bin/python", "runs/a/metrics.jsonl", "data/a.parquet", "tests/assets/a.npz"),
        *("dist/a.whl", "platform/rayllava/data/__pycache__/plan.pyc", ".mypy_cache/a.json"),
    ]
    checkout = tmp_path / "checkout"
    for path in code + ballast:
        (checkout / path).parent.mkdir(parents=True, exist_ok=True)
        (checkout / path).write_text("x")
    shutil.copy(ROOT / ".gitignore", checkout)

    package = tmp_path / "package.zip"
    create_package(str(checkout), package, include_gitignore=True, excludes=runtime_env(RUNTIME_ENV.name)["excludes"])
    assert sorted(zipfile.ZipFile(package).namelist()) == sorted([".gitignore", *code])


# --- ours


@every_manifest
def test_one_ray_version_everywhere(name: str) -> None:
    installed = version("ray")
    spec = cluster_spec(manifest(name))
    assert spec["rayVersion"] == installed
    for _, _, pod in pods(spec):
        for container in pod["containers"]:
            tag = container["image"].rpartition(":")[2]
            assert tag.split("-")[0] == installed, f"{container['image']} does not hold Ray {installed}"


@every_manifest
def test_pods_are_given_time_to_drain(name: str) -> None:
    for group_name, _, pod in pods(cluster_spec(manifest(name))):
        (container,) = pod["containers"]
        drain_s = int(env(container).get("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", RAY_DRAINS_S))
        assert pod["terminationGracePeriodSeconds"] >= drain_s + 10, f"{group_name} is killed while it drains"
        assert "lifecycle" not in container, f"{group_name}: a preStop hook ends Ray before it drains"


@every_manifest
def test_pods_are_not_root_and_hold_nothing_but_references_to_secrets(name: str) -> None:
    for group_name, _, pod in pods(cluster_spec(manifest(name))):
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"], group_name
        assert container["securityContext"]["allowPrivilegeEscalation"] is False, group_name
        for variable in container.get("env", []):
            secret = re.search("TOKEN|SECRET|PASSWORD|KEY", variable["name"])
            assert not (secret and "value" in variable), f"{group_name}: {variable['name']} is written out"


@every_manifest
def test_every_pod_gets_what_it_asks_for_and_memory_that_does_not_touch_disk(name: str) -> None:
    for group_name, _, pod in pods(cluster_spec(manifest(name))):
        (container,) = pod["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"], group_name
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory", group_name


@every_manifest
def test_driver_and_workers_see_the_same_storage(name: str) -> None:
    seen = [
        [(volume["name"], volume["persistentVolumeClaim"]) for volume in pod["volumes"] if "emptyDir" not in volume]
        + pod["containers"][0]["volumeMounts"]
        for _, _, pod in pods(cluster_spec(manifest(name)))
    ]
    assert all(one == seen[0] for one in seen)


@every_manifest
def test_ray_answers_only_to_its_token(name: str) -> None:
    assert cluster_spec(manifest(name))["authOptions"]["mode"] == "token"


def test_a_gpu_group_lands_on_gpu_nodes() -> None:
    for name in MANIFESTS:
        for group_name, _, pod in pods(cluster_spec(manifest(name))):
            wants_gpu = "nvidia.com/gpu" in pod["containers"][0]["resources"]["limits"]
            tolerated = [toleration["key"] for toleration in pod.get("tolerations", [])]
            assert wants_gpu == ("nvidia.com/gpu" in tolerated), f"{name} {group_name}"


@pytest.mark.parametrize("name", [name for name in MANIFESTS if name.startswith("rayjob")])
def test_a_job_is_one_that_a_person_could_start(name: str) -> None:
    from rayllava.recipe import load, override

    wanted = manifest(name)
    python, program, *words = shlex.split(wanted["spec"]["entrypoint"])
    assert python == "python"
    assert (ROOT / program).is_file()
    assert Path(program).parent.name == "jobs"
    if Path(program).stem in {"pretrain", "finetune"}:
        recipe = override(load(words[0]), words[1:])
        assert recipe.scale.max_workers <= most_gpus(wanted), "the cluster cannot grow to the most workers"


@pytest.mark.parametrize("name", [name for name in MANIFESTS if name.startswith("rayjob")])
def test_a_spot_drought_does_not_stop_a_job(name: str) -> None:
    words = manifest(name)["spec"]["entrypoint"].split()
    (workers,) = [word.partition("=")[2] for word in words if word.startswith("scale.workers=")]
    assert most_gpus(manifest(name), but_not="spot") >= int(workers.partition(":")[0])


def test_the_endpoint_has_its_token_on_every_pod() -> None:
    for group_name, _, pod in pods(cluster_spec(manifest("rayservice.yaml"))):
        variables = {variable["name"]: variable for variable in pod["containers"][0]["env"]}
        assert variables["RAYLLAVA_API_TOKEN"]["valueFrom"]["secretKeyRef"]["name"], group_name


def test_an_old_serving_cluster_outlives_its_streams() -> None:
    service = manifest("rayservice.yaml")
    drains = [
        int(env(pod["containers"][0]).get("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", RAY_DRAINS_S))
        for _, _, pod in pods(cluster_spec(service))
    ]
    assert service["spec"]["rayClusterDeletionDelaySeconds"] >= max(drains)
    assert all(group["minReplicas"] >= 2 for group in cluster_spec(service)["workerGroupSpecs"])


def test_the_image_copies_what_there_is_and_does_not_run_as_root() -> None:
    lines = (CLUSTER / "image/Dockerfile").read_text().splitlines()
    sources = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert {"platform", "jobs", "serving"} <= set(sources)
    assert [source for source in sources if not (ROOT / source).exists()] == []
    assert [line.split()[1] for line in lines if line.startswith("USER ")] == ["1000"]


# --- reading manifests
