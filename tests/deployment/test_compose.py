"""The Compose files are what Docker Compose and Flower's own command lines take."""

import re
from pathlib import Path

import pytest
import yaml
from flwr.common.config import parse_config_args
from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deployment"
HOSTS = ("cloud", "device")
VARIABLES = {
    "SUPERLINK": "10.0.0.1:9091",
    "NODE_KEY": "node-0",
    "NODE_CONFIG": "partition-id=0 num-partitions=4 live-budget=true",
}
SERVICE_KEYS = {
    "image",
    "build",
    "restart",
    "environment",
    "command",
    "ports",
    "volumes",
}


def compose(host: str) -> dict:
    return yaml.safe_load((FOLDER / f"{host}.yaml").read_text())


def command(service: dict) -> list[str]:
    """Fill in the variables, each of which must be asked for if it is missing."""
    words = [
        re.sub(r"\$\{(\w+):\?[^}]+\}", lambda match: VARIABLES[match[1]], word)
        for word in service["command"]
    ]
    assert not any("$" in word for word in words)
    return words


@pytest.mark.parametrize("host", HOSTS)
def test_it_has_the_shape_of_the_compose_specification(host: str):
    file = compose(host)
    assert set(file) <= {"name", "services", "volumes"}
    for service in file["services"].values():
        assert set(service) <= SERVICE_KEYS
        assert all(isinstance(word, str) for word in service["command"])
        assert all(isinstance(value, str) for value in service["environment"].values())
        for volume in service["volumes"]:
            source, target, *mode = volume.split(":")
            assert source.startswith("./") or source in file["volumes"]
            assert target.startswith("/")
            assert mode in ([], ["ro"])
        build = FOLDER / service["build"]["context"]
        assert (build / service["build"]["dockerfile"]).is_file()


def test_no_host_needs_the_others_part():
    """Compose fills in the variables of all services, those not started included."""
    assert {host: list(compose(host)["services"]) for host in HOSTS} == {
        "cloud": ["superlink"],
        "device": ["supernode"],
    }
    assert "${" not in (FOLDER / "cloud.yaml").read_text()


def test_flower_takes_the_supernodes_command():
    program, *arguments = command(compose("device")["services"]["supernode"])
    assert program == "flower-supernode"
    parsed = _parse_args_run_supernode().parse_args(arguments)
    assert not parsed.insecure
    assert parsed.superlink == VARIABLES["SUPERLINK"]
    node_config = parse_config_args([parsed.node_config])
    assert node_config == {"partition-id": 0, "num-partitions": 4, "live-budget": True}


def test_the_superlink_has_tls_authentication_and_a_database():
    superlink = compose("cloud")["services"]["superlink"]
    program, *arguments = command(superlink)
    assert program == "flower-superlink"
    options = dict(argument.partition("=")[::2] for argument in arguments)
    assert "--insecure" not in options
    assert "--enable-supernode-auth" in options
    assert options["--database"].startswith("/state/")
    assert all(options[f"--ssl-{name}"] for name in ("ca-certfile", "certfile", "keyfile"))
    assert superlink["ports"] == [f"{options['--port']}:{options['--port']}"]


def test_the_image_copies_what_is_there():
    copied = re.findall(r"^COPY (.+) \S+$", (FOLDER / "Dockerfile").read_text(), re.MULTILINE)
    assert copied
    for source in " ".join(copied).split():
        assert (ROOT / source).exists()
