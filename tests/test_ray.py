"""The server on Ray Serve: what is answered by two replicas, when one is killed, when they are replaced, when there are more."""
import functools, importlib.util, json, os, shutil, subprocess, sys
from pathlib import Path

import pytest
import yaml

from aura_engine.scale import shapes_of
from conftest import ROOT, clean_env

HOUSE = ROOT / "tests/ray_house.py"
PARTS = ["doors", "jobs", "hung_up", "killed", "told_to_stop", "loading", "updated", "full", "redis_away", "models", "scaled"]


def in_own_network(argv):
    """A command in a network namespace with nothing but a loopback."""
    return ["unshare", "-rn", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *argv]


@functools.cache
def can_run():
    if not importlib.util.find_spec("ray") or not all(map(shutil.which, ("redis-server", "nginx", "unshare"))): return False
    return subprocess.run(in_own_network(["true"]), capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What happened, by part. Each takes a minute, so they share the engines."""
    cache = {"XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache"))}
    done = subprocess.run(in_own_network([sys.executable, str(HOUSE), *PARTS]), capture_output=True, text=True, timeout=2400, cwd=ROOT, env=clean_env(PYTHONPATH=ROOT, **cache))
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def only_with_ray(test):
    """The first one waits for the whole house: twelve minutes on two cores, and much longer where other programs run."""
    here = pytest.mark.skipif(not can_run(), reason="Ray, Redis, nginx or Linux namespaces are not here (pip install ray[serve])")
    return pytest.mark.slow(pytest.mark.timeout(2500)(here(test)))


@only_with_ray
def test_every_door_answers_as_without_ray(told):
    assert told["doors"] == {"page": "text/html; charset=utf-8", "health": "ready", "ready": 200, "picture": 3, "png": "image/png", "openai": 200,
                             "events": ["queued", *told["doors"]["events"][1:-1], "done"], "wrong": [422, "application/problem+json"]}
    assert {"step", "image"} <= set(told["doors"]["events"])


@only_with_ray
def test_jobs_of_both_replicas_are_found(told): assert told["jobs"] == {"owners": 2, "states": {"succeeded": 10}}


@only_with_ray
def test_work_stops_when_its_client_leaves(told): assert told["hung_up"]["seconds"] < 30        # of a picture that takes longer


@only_with_ray
@pytest.mark.parametrize("how", ["killed", "told_to_stop"])
def test_a_replica_that_ends_loses_no_picture_and_its_job_says_so(told, how):
    """The door sends a request again when its engine is gone before the answer began."""
    assert set(told[how]["answers"]) == {"200"} and told[how]["job"] == 410 and told[how]["ask"]


@only_with_ray
def test_while_an_engine_loads_the_other_one_answers(told):
    assert told["loading"]["before"] == {"RUNNING": 1, "STARTING": 1} and set(told["loading"]["answers"]) == {"200"}


@only_with_ray
def test_replacing_every_replica_loses_nothing(told):
    assert set(told["updated"]["answers"]) == {"200"} and told["updated"]["kept"] == 0 and told["updated"]["steps"] == 3


@only_with_ray
def test_full_engines_say_when_to_come_back(told):
    assert set(told["full"]["answers"]) == {"200", "429 with Retry-After"} and told["full"]["after"] == "ready"


@only_with_ray
def test_a_redis_that_goes_away_costs_no_picture(told):
    assert set(told["redis_away"]["answers"]) == {"200"} and told["redis_away"]["new job"] == "succeeded"


@only_with_ray
def test_two_models_stand_behind_one_door(told):
    said = told["models"]
    assert said["default"] != 3 and {said["by model"], said["by address"], said["job"]} == {3}
    assert said["deployments"] == ["door", "engine-ink", "engine-oil"] and said["listed"] == ["ink", "oil"]
    assert (said["openai"], said["theirs"]) == (200, 200) and said["huggingface"].startswith("image/")
    assert said["wrong"] == [422, "model: given 'water', allowed: ink, oil."]


@only_with_ray
def test_a_second_engine_comes_with_the_work_and_goes_with_it(told):
    assert {kind[:3] for kind in told["scaled"]["answers"]} <= {"200", "429"} and told["scaled"]["after"] == 200


def applications():
    service = yaml.safe_load((ROOT / "deploy/ray/rayservice.yaml").read_text())
    files = [yaml.safe_load((ROOT / "deploy/ray/serve.yaml").read_text()), yaml.safe_load(service["spec"]["serveConfigV2"])]
    return [application for file in files for application in file["applications"]]


@pytest.mark.parametrize("application", applications(), ids=["serve.yaml", "rayservice.yaml"])
def test_the_files_name_what_there_is(application):
    module, name = application["import_path"].split(":")
    assert callable(getattr(importlib.import_module(module), name)) and shapes_of(application["args"])[""].most == 4


@pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="Ray is not installed")
def test_the_file_is_what_rays_schema_says():
    from ray.serve.schema import ServeDeploySchema
    content = yaml.safe_load((ROOT / "deploy/ray/serve.yaml").read_text())
    assert ServeDeploySchema(**content).applications[0].import_path == "aura_engine.scale:app"
    with pytest.raises(ValueError): ServeDeploySchema(**content | {"applications": [content["applications"][0] | {"import_path": "nothing"}]})


def closed(schema):
    """The schema of a Kubernetes kind as its server reads it strictly: a field that it does not name is an error."""
    if isinstance(schema, list): return [closed(one) for one in schema]
    if not isinstance(schema, dict): return schema
    schema = {name: closed(value) for name, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string"): schema.pop("type", None)
    known = isinstance(schema.get("properties"), dict) and "x-kubernetes-preserve-unknown-fields" not in schema
    return schema | {"additionalProperties": False} if known and "additionalProperties" not in schema else schema


@pytest.mark.skipif(not os.environ.get("KUBERAY_CRD"), reason="KUBERAY_CRD does not name the file of KubeRay's RayService kind (ray.io_rayservices.yaml)")
def test_kuberays_file_is_what_its_kind_says():
    jsonschema = pytest.importorskip("jsonschema")
    versions = yaml.safe_load(Path(os.environ["KUBERAY_CRD"]).read_text())["spec"]["versions"]
    service = yaml.safe_load((ROOT / "deploy/ray/rayservice.yaml").read_text())
    kind = next(version for version in versions if f"ray.io/{version['name']}" == service["apiVersion"])
    validator = jsonschema.Draft7Validator(closed(kind["schema"]["openAPIV3Schema"]))
    assert [error.message for error in validator.iter_errors(service)] == []
    service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["minReplica"] = 1
    assert len(list(validator.iter_errors(service))) == 1


def test_kuberays_file_has_pods_that_kubernetes_reads():
    """KubeRay's own kind is read only where its file is at hand, the pods in it always."""
    validate = pytest.importorskip("kubernetes_validate")
    cluster = yaml.safe_load((ROOT / "deploy/ray/rayservice.yaml").read_text())["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        validate.validate({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, **group["template"]}, "1.34", strict=True)
