import subprocess
import sys


def loaded_by(*packages):
    """Names of the modules in a fresh interpreter that imported some packages."""
    code = f"import sys, {', '.join(packages)}; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return set(result.stdout.split())


def test_the_method_needs_neither_flower_nor_ray():
    loaded = loaded_by(
        "eclm_flower", "eclm_flower.modular", "eclm_flower.adaptation", "eclm_flower.prototyping"
    )
    assert "torch" in loaded
    assert not loaded & {"flwr", "ray", "eclm_flower.federation", "strategies", "simulations"}


def test_modular_builds_on_nothing_but_errors():
    own = {name for name in loaded_by("eclm_flower.modular") if name.startswith("eclm_flower.")}
    assert {name.split(".")[1] for name in own} == {"modular", "errors"}
