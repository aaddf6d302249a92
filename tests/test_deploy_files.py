"""The files in deploy/ against the schemas of the programs that read them, and against each other."""
import json, re, select, shutil, socket, subprocess, sys, time

import pytest
import yaml

from conftest import ROOT, free_port

DEPLOY = ROOT / "deploy"
KUBERNETES = [doc for name in ("aura.yaml", "autoscale.yaml") for doc in yaml.safe_load_all((DEPLOY / "kubernetes" / name).read_text())]
DASHBOARD = json.loads((DEPLOY / "grafana/aura.json").read_text())


def merged(file):
    """A compose file as its reader sees it: anchors and merge keys resolved, which JSON Schema knows nothing of."""
    return yaml.safe_load((DEPLOY / file).read_text())


def holds_against_compose(content, folder):
    (folder / "compose.json").write_text(json.dumps(content))
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(folder / "compose.json")]
    done = subprocess.run(check, capture_output=True, text=True)
    return done.returncode == 0, done.stdout


@pytest.mark.parametrize("file", ["compose.yaml", "compose.gpu.yaml", "compose.traces.yaml"])
def test_compose_files_are_what_the_compose_specification_says(file, tmp_path):
    content = merged(file)
    good, said = holds_against_compose(content, tmp_path)
    assert good, said
    wrong = content | {"services": content["services"] | {"engine1": content["services"]["engine1"] | {"volume": ["models:/x"]}}}
    assert not holds_against_compose(wrong, tmp_path)[0]              # the schema sees a misspelt key


# KEDA's own kinds are not among Kubernetes' schemas
@pytest.mark.parametrize("doc", [doc for doc in KUBERNETES if not doc["apiVersion"].startswith("keda.sh")], ids=lambda doc: f"{doc['kind']}-{doc['metadata']['name']}")
def test_kubernetes_objects_are_what_its_schemas_say(doc):
    validate = pytest.importorskip("kubernetes_validate")
    validate.validate(doc, "1.34", strict=True)
    misspelt = json.loads(json.dumps(doc))
    misspelt["spec"]["selectors"] = misspelt["spec"].pop("selector")
    with pytest.raises(validate.ValidationError): validate.validate(misspelt, "1.34", strict=True)


def test_the_autoscaler_names_what_there_is():
    by_kind = {(doc["kind"], doc["metadata"]["name"]): doc for doc in KUBERNETES}
    scaled = by_kind["ScaledObject", "aura"]["spec"]
    assert ("Deployment", scaled["scaleTargetRef"]["name"]) in by_kind and scaled["minReplicaCount"] <= scaled["maxReplicaCount"]
    assert metrics_in(scaled["triggers"][0]["metadata"]["query"]) <= known_metrics()


def lost(given, kept, path=""):
    """What of a JSON value a reader did not keep."""
    if isinstance(given, dict) and isinstance(kept, dict):
        return [p for key, value in given.items() for p in ([f"{path}.{key}"] if key not in kept else lost(value, kept[key], f"{path}.{key}"))]
    if isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        return [p for i, (one, other) in enumerate(zip(given, kept)) for p in lost(one, other, f"{path}[{i}]")]
    return [] if given == kept else [path]


def read_by_grafana(dashboard):
    """The dashboard after Grafana's own classes, which are made from its schemas, have read and written it."""
    models = pytest.importorskip("grafana_foundation_sdk.models.dashboard")
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    return json.loads(json.dumps(models.Dashboard.from_json(dashboard), cls=JSONEncoder))


def test_the_dashboard_is_what_grafanas_schema_says():
    assert lost(DASHBOARD, read_by_grafana(DASHBOARD)) == []
    assert lost(DASHBOARD | {"refesh": "5s"}, read_by_grafana(DASHBOARD | {"refesh": "5s"})) == [".refesh"]
    sources = yaml.safe_load((DEPLOY / "grafana/datasource.yaml").read_text())["datasources"]
    assert {panel["datasource"]["uid"] for panel in DASHBOARD["panels"]} <= {source["uid"] for source in sources}


def known_metrics():
    """Names of the series that /metrics of an engine has."""
    from prometheus_client.parser import text_string_to_metric_families
    from starlette.testclient import TestClient
    from aura_engine.config import load_settings
    from aura_engine.server import create_server
    app, _ = create_server(load_settings(SD_MODEL_ID="embedded"))
    with TestClient(app) as web: families = list(text_string_to_metric_families(web.get("/metrics").text))
    kinds = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
    return {f.name + end for f in families for end in kinds.get(f.type, ("",))} | {"up"}


def metrics_in(query): return set(re.findall(r"\b(?:aura|process)_\w+|\bup\b", query))


def test_the_dashboard_asks_for_series_that_there_are():
    asked = {name for panel in DASHBOARD["panels"] for target in panel["targets"] for name in metrics_in(target["expr"])}
    assert asked and asked <= known_metrics()


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed")
def test_prometheus_reads_its_file_and_every_query(tmp_path):
    done = subprocess.run(["promtool", "check", "config", str(DEPLOY / "prometheus.yml")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    queries = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    rules = {"groups": [{"name": "panels", "rules": [{"record": f"panel:{i}", "expr": query} for i, query in enumerate(queries)]}]}
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rules))
    done = subprocess.run(["promtool", "check", "rules", str(tmp_path / "rules.yml")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_files_agree_on_engines_and_ports():
    compose, prometheus = merged("compose.yaml"), yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    engines = {name: service["environment"]["AURA_REPLICA"] for name, service in compose["services"].items() if "AURA_REPLICA" in service.get("environment", {})}
    targets = prometheus["scrape_configs"][0]["static_configs"][0]["targets"]
    assert {target.split(":")[0] for target in targets} == set(engines)
    (label,) = prometheus["scrape_configs"][0]["relabel_configs"]
    replicas = {re.sub(label["regex"], label["replacement"].replace("$", "\\"), target) for target in targets}
    assert label["target_label"] == "replica" and replicas == set(engines.values())
    upstreams = (DEPLOY / "nginx/engines.conf").read_text()
    assert all(f"{name}:7860" in upstreams and re.search(rf"\b{replica}\b", upstreams) for name, replica in engines.items())
    assert all(set(service["environment"]) >= {"AURA_REDIS_URL", "AURA_PROXIES"} for name, service in compose["services"].items() if name in engines)
    assert set(merged("compose.gpu.yaml")["services"]) <= set(engines)


def test_the_collector_passes_on_what_the_engines_send():
    """The collector's own schema is not on this machine: its pipelines are held against its parts, and the addresses against each other."""
    collector, compose = merged("collector.yaml"), merged("compose.traces.yaml")["services"]
    for pipeline in collector["service"]["pipelines"].values():
        assert all(set(names) <= set(collector[kind]) for kind, names in pipeline.items())
    port = collector["receivers"]["otlp"]["protocols"]["http"]["endpoint"].rsplit(":", 1)[1]
    for name in ("engine1", "engine2"): assert compose[name]["environment"]["OTEL_EXPORTER_OTLP_ENDPOINT"] == f"http://collector:{port}"
    assert collector["exporters"]["otlphttp"]["endpoint"].split("//")[1].split(":")[0] in compose
    assert set(compose) >= {"collector", "jaeger"} and "collector.yaml" in compose["collector"]["volumes"][0]


@pytest.mark.skipif(not shutil.which("nginx"), reason="nginx is not installed")
def test_nginx_reads_the_engines_that_aura_fleet_writes(tmp_path):
    conf = shutil.copytree(DEPLOY / "nginx", tmp_path / "nginx")
    urls = [f"http://127.0.0.1:786{i}" for i in (1, 2, 3, 4)]
    (conf / "engines.conf").write_text(subprocess.run([sys.executable, "-m", "aura_engine.fleet", "--nginx", *urls], cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    done = subprocess.run(["nginx", "-t", "-p", str(tmp_path), "-c", str(conf / "nginx.conf")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    refused = subprocess.run([sys.executable, "-m", "aura_engine.fleet", "--nginx", "https://a.example"], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 1 and "https://a.example" in refused.stderr


@pytest.mark.skipif(not shutil.which("nginx"), reason="nginx is not installed")
def test_nginx_lets_one_address_have_so_many_requests_and_bodies(tmp_path):
    """Bodies that do not come keep their places: the seventeenth large one is refused as an engine would, small ones are not."""
    conf, port = shutil.copytree(DEPLOY / "nginx", tmp_path / "nginx"), free_port()
    (conf / "listen.conf").write_text(f"listen 127.0.0.1:{port};")
    (conf / "engines.conf").write_text(f"upstream engines {{ server 127.0.0.1:{free_port()}; }}\nmap $uri $engine {{ default engines; }}\n")
    nginx, held = subprocess.Popen(["nginx", "-p", str(tmp_path), "-c", str(conf / "nginx.conf"), "-g", "daemon off;"]), []

    def ask(length):
        held.append(s := socket.create_connection(("127.0.0.1", port), timeout=10))
        s.sendall(f"POST /refine HTTP/1.1\r\nhost: x\r\n{length}\r\n\r\n".encode())
        return s
    try:
        for _ in range(100):
            try: socket.create_connection(("127.0.0.1", port)).close(); break
            except OSError: time.sleep(.1)
        waiting = [ask("transfer-encoding: chunked" if i % 2 else "content-length: 2000000") for i in range(16)]
        answer = ask("content-length: 2000000").recv(65536).decode()
        assert "429 Too Many" in answer and "urn:aura:queue_full" in answer and "retry-after: 5" in answer.lower()
        waiting += [ask("content-length: 20000") for _ in range(48)]
        assert "429 Too Many" in ask("content-length: 20000").recv(65536).decode()
        assert not select.select(waiting, [], [], 0)[0]       # none of the others was answered
    finally:
        for s in held: s.close()
        nginx.kill()
        subprocess.run(["nginx", "-p", str(tmp_path), "-c", str(conf / "nginx.conf"), "-s", "stop"], capture_output=True)


@pytest.mark.skipif(not shutil.which("nginx"), reason="nginx is not installed")
def test_nginx_takes_a_network_for_one_client_and_ends_half_heads(tmp_path):
    """Of eighteen large bodies from addresses of one IPv6 network two are refused. Another network has places of its own."""
    conf, port = shutil.copytree(DEPLOY / "nginx", tmp_path / "nginx"), free_port()
    (conf / "listen.conf").write_text(f"listen 127.0.0.1:{port}; set_real_ip_from 127.0.0.1; real_ip_header X-Test;")
    (conf / "engines.conf").write_text(f"upstream engines {{ server 127.0.0.1:{free_port()}; }}\nmap $uri $engine {{ default engines; }}\n")
    as_read = subprocess.run(["nginx", "-T", "-p", str(tmp_path), "-c", str(conf / "nginx.conf")], capture_output=True, text=True).stdout
    assert int(re.search(r"client_header_timeout (\d+)s;", as_read)[1]) <= 15
    nginx, held = subprocess.Popen(["nginx", "-p", str(tmp_path), "-c", str(conf / "nginx.conf"), "-g", "daemon off;"]), []

    def ask(address):
        held.append(s := socket.create_connection(("127.0.0.1", port), timeout=10))
        s.sendall(f"POST /refine HTTP/1.1\r\nhost: x\r\nx-test: {address}\r\ncontent-length: 2000000\r\n\r\n".encode())
        return s
    try:
        for _ in range(100):
            try: socket.create_connection(("127.0.0.1", port)).close(); break
            except OSError: time.sleep(.1)
        network, end = [ask(f"2001:db8:1:2:{i:x}::{i:x}") for i in range(1, 19)], time.monotonic() + 20
        while len(refused := select.select(network, [], [], .1)[0]) < 2: assert time.monotonic() < end
        assert all("429 Too Many" in s.recv(65536).decode() for s in refused) and len(refused) == 2
        waiting = [ask(address) for address in ("2001:db8:1:3::1", "203.0.113.5", "203.0.113.6", "::ffff:0:1")]
        assert "429 Too Many" in ask("2001:db8:1:2:ffff:ffff:ffff:ffff").recv(65536).decode()
        assert not select.select(waiting, [], [], 0)[0]
    finally:
        for s in held: s.close()
        nginx.kill()
        subprocess.run(["nginx", "-p", str(tmp_path), "-c", str(conf / "nginx.conf"), "-s", "stop"], capture_output=True)


@pytest.mark.parametrize("file", ["compose.yaml", "compose.traces.yaml"])
def test_no_log_of_a_container_grows_for_ever(file):
    services = merged(file)["services"]
    bounded = {name for name, service in services.items() if service.get("logging", {}).get("options", {}).get("max-size")}
    assert bounded == {name for name, service in services.items() if "image" in service or file == "compose.yaml"}


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
def test_systemd_reads_its_unit(tmp_path):
    unit = (DEPLOY / "systemd/aura@.service").read_text().replace("/opt/aura/.venv/bin/aura", sys.executable)
    (tmp_path / "aura@.service").write_text(unit)
    done = subprocess.run(["systemd-analyze", "verify", str(tmp_path / "aura@0.service")], capture_output=True, text=True)
    complaints = [line for line in done.stderr.splitlines() if "aura@" in line]
    assert not complaints, complaints
