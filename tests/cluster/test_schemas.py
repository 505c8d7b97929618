"""Every manifest against the real schema of its kind, unknown fields refused."""

import copy
import shutil
import subprocess

import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.cluster.crd import CRDS, mistakes
from tests.cluster.manifests import CLUSTER, manifests, read

# The oldest Kubernetes that has all that is used (podFailurePolicy), and the newest that we have schemas of.
KUBERNETES_VERSIONS = ("1.31", kubernetes_validate.latest_version())
MANIFESTS = manifests()
CUSTOM = [name for name, manifest in MANIFESTS.items() if manifest["apiVersion"].startswith("ray.io/")]
PLAIN = [name for name in MANIFESTS if name not in CUSTOM]

needs_crds = pytest.mark.skipif(not CRDS.exists(), reason="../shared/crds (KubeRay's definitions) is not there")
needs_kubectl = pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl, which renders kustomize, is not there")


@needs_crds
@pytest.mark.parametrize("name", CUSTOM)
def test_a_custom_resource_fits_kuberays_own_definition(name):
    assert not mistakes(MANIFESTS[name])


@needs_crds
@pytest.mark.parametrize(
    ("path", "key", "value"),
    [
        (("spec",), "rayVersio", "2.60.0"),
        (("spec", "headGroupSpec"), "template", None),
        (("spec", "authOptions"), "mode", "tokens"),
        (("spec", "headGroupSpec", "template", "spec", "containers", 0), "imagePullPolicie", "Always"),
        (("spec", "workerGroupSpecs", 0), "replicas", "two"),
        (("spec", "workerGroupSpecs", 0, "template", "spec", "volumes", 0), "persistentVolumeClaim", {"claim": "data"}),
    ],
)
def test_a_mistake_in_a_custom_resource_is_found(path, key, value):
    manifest = copy.deepcopy(MANIFESTS["raycluster.yaml"])
    inner = manifest
    for part in path:
        inner = inner[part]
    inner[key] = value
    assert any(".".join(map(str, path)) in mistake for mistake in mistakes(manifest))


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_object_fits_kubernetes_own_schema(name, version):
    kubernetes_validate.validate(MANIFESTS[name], version, strict=True)


def test_a_mistake_in_a_plain_object_is_found():
    manifest = copy.deepcopy(MANIFESTS["nightly.yaml"])
    manifest["spec"]["concurencyPolicy"] = "Forbid"
    with pytest.raises(kubernetes_validate.ValidationError, match="concurencyPolicy"):
        kubernetes_validate.validate(manifest, KUBERNETES_VERSIONS[0], strict=True)


@needs_kubectl
@pytest.mark.parametrize("folder", ["kubernetes", "kubernetes-gpu"])
@pytest.mark.processes
def test_what_kustomize_makes_of_them_still_fits(folder):
    rendered = subprocess.run(["kubectl", "kustomize", CLUSTER / folder], capture_output=True, text=True, check=True)
    objects = list(yaml.safe_load_all(rendered.stdout))
    tag = "-cuda" if folder == "kubernetes-gpu" else ""
    images = [
        line.split()[-1] for line in rendered.stdout.splitlines() if line.strip().startswith(("image:", "- image:"))
    ]
    assert len(images) == 3 and all(image.startswith("registry.example.com/promptbank:") for image in images)
    assert all(image.endswith(f"0{tag}") for image in images)
    assert ("nvidia.com/gpu" in rendered.stdout) == bool(tag)
    assert {one["kind"] for one in objects} >= {"RayCluster", "CronJob", "ConfigMap", "PersistentVolumeClaim"}
    for one in objects:
        if not one["apiVersion"].startswith("ray.io/"):
            kubernetes_validate.validate(one, KUBERNETES_VERSIONS[0], strict=True)
        elif CRDS.exists():
            assert not mistakes(one)


@pytest.mark.parametrize("name", ["ray-aws.yaml", "ray-local.yaml"])
def test_a_launcher_file_fits_rays_own_schema(name):
    config = prepare_config(read(CLUSTER / name))
    validate_config(config)
    # What the launcher takes from us, and not from its defaults.
    assert config["docker"]["image"] and "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert not any("pip install" in command for command in config["setup_commands"])


def test_a_mistake_in_a_launcher_file_is_found():
    config = read(CLUSTER / "ray-local.yaml")
    config["head_start_commands"] = config.pop("head_start_ray_commands")
    with pytest.raises(Exception, match="head_start_commands"):
        validate_config(prepare_config(config))
