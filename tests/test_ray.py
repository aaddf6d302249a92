"""The server on Ray Serve: what is answered by two replicas, when one is killed, when they are replaced, when there are more."""
import importlib.util, json, shutil, subprocess, sys

import pytest
import yaml

from aura_engine.scale import shape_of
from conftest import ROOT, clean_env

HOUSE = ROOT / "tests/ray_house.py"
PARTS = ["doors", "jobs", "killed", "shielded", "updated", "scaled"]


def in_own_network(argv):
    """A command in a network namespace with nothing but a loopback."""
    return ["unshare", "-rn", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *argv]


def can_run():
    if not importlib.util.find_spec("ray") or not all(map(shutil.which, ("redis-server", "nginx", "unshare"))): return False
    return subprocess.run(in_own_network(["true"]), capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What happened, by part; each takes a minute, so they share the engines."""
    cache = {"XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache"))}
    done = subprocess.run(in_own_network([sys.executable, str(HOUSE), *PARTS]), capture_output=True, text=True, timeout=900, cwd=ROOT, env=clean_env(PYTHONPATH=ROOT, **cache))
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


only_with_ray = pytest.mark.skipif(not can_run(), reason="Ray, Redis, nginx or Linux namespaces are not here (pip install ray[serve])")


@only_with_ray
@pytest.mark.slow
def test_every_door_answers_as_without_ray(told):
    assert told["doors"] == {"page": "text/html; charset=utf-8", "health": "ready", "ready": 200, "picture": 3, "png": "image/png", "openai": 200,
                             "events": ["queued", *told["doors"]["events"][1:-1], "done"], "wrong": [422, "application/problem+json"]}
    assert {"step", "image"} <= set(told["doors"]["events"])


@only_with_ray
@pytest.mark.slow
def test_jobs_of_both_replicas_are_found(told): assert told["jobs"] == {"owners": 2, "states": {"succeeded": 10}}


@only_with_ray
@pytest.mark.slow
def test_a_killed_replica_is_replaced_and_its_job_says_so(told):
    """Ray's proxy does not send a request again, so those that the replica had are lost, and nothing else."""
    answers = told["killed"]["answers"]
    lost = sum(count for kind, count in answers.items() if not kind.startswith("200"))
    assert lost <= 8 and answers["200 application/json"] > lost and told["killed"]["job"] == 410 and told["killed"]["ask"]


@only_with_ray
@pytest.mark.slow
def test_behind_nginx_nothing_is_lost_with_a_killed_replica(told):
    assert set(told["shielded"]["answers"]) == {"200 application/json"}


@only_with_ray
@pytest.mark.slow
def test_replacing_every_replica_loses_nothing(told):
    assert set(told["updated"]["answers"]) == {"200 application/json"} and told["updated"]["kept"] == 0 and told["updated"]["steps"] == 3


@only_with_ray
@pytest.mark.slow
def test_a_second_engine_comes_with_the_work_and_goes_with_it(told):
    assert {kind.split()[0] for kind in told["scaled"]["answers"]} <= {"200", "429"} and told["scaled"]["after"] == 200


def applications():
    service = yaml.safe_load((ROOT / "deploy/ray/rayservice.yaml").read_text())
    files = [yaml.safe_load((ROOT / "deploy/ray/serve.yaml").read_text()), yaml.safe_load(service["spec"]["serveConfigV2"])]
    return [application for file in files for application in file["applications"]]


@pytest.mark.parametrize("application", applications(), ids=["serve.yaml", "rayservice.yaml"])
def test_the_files_name_what_there_is(application):
    module, name = application["import_path"].split(":")
    assert callable(getattr(importlib.import_module(module), name)) and shape_of(application["args"]).most == 4


@pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="Ray is not installed")
def test_the_file_is_what_rays_schema_says():
    from ray.serve.schema import ServeDeploySchema
    content = yaml.safe_load((ROOT / "deploy/ray/serve.yaml").read_text())
    assert ServeDeploySchema(**content).applications[0].import_path == "aura_engine.scale:app"
    with pytest.raises(ValueError): ServeDeploySchema(**content | {"applications": [content["applications"][0] | {"import_path": "nothing"}]})


def test_kuberays_file_has_pods_that_kubernetes_reads():
    """KubeRay's own kind has no schema here, the pods in it have."""
    validate = pytest.importorskip("kubernetes_validate")
    cluster = yaml.safe_load((ROOT / "deploy/ray/rayservice.yaml").read_text())["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        validate.validate({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, **group["template"]}, "1.34", strict=True)
