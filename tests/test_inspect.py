"""The console command, as a user runs it."""

import re
import subprocess
import sys

import pytest

from eclm_flower.__main__ import main


@pytest.fixture
def inspect(monkeypatch, capsys):
    """Run the command line; returns exit status, what was printed, and what went to stderr."""

    def inspect(*arguments):
        monkeypatch.setattr(sys, "argv", ["eclm-flower", "inspect", *arguments])
        with pytest.raises(SystemExit) as done:
            main()
        printed = capsys.readouterr().out
        if isinstance(done.value.code, str):  # the interpreter prints it and exits with 1
            return 1, printed, done.value.code
        return done.value.code, printed, ""

    return inspect


def rows(output):
    """Rows of the tables: name -> numbers."""
    found = {}
    for line in output.splitlines():
        if match := re.match(r"(\S.*?)  +((?:[\d,.]+ *)+)$", line):
            found[match[1]] = [float(n.replace(",", "")) for n in match[2].split()]
    return found


def test_it_prints_layers_modules_costs_and_what_a_budget_buys(inspect):
    status, printed, _ = inspect("resnet18", "--modules", "16", "--budget-mb", "8")
    assert not status
    assert "resnet18: 11,689,512 parameters, one input is 3x224x224, 8 module layers." in printed
    table = rows(printed)
    layers = {name: numbers for name, numbers in table.items() if name.startswith("layer")}
    assert list(layers) == [f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)]
    assert all(numbers[0] == 16 and numbers[1] >= 1 for numbers in layers.values())
    # What is bought adds up to what is said of the sub-model, and stays within the budget.
    sent = table["shared part"][0] + sum(n[1] * n[3] for n in layers.values())
    bought = table["this budget's sub-model"]
    assert sent == pytest.approx(bought[0], abs=0.05)
    assert table["smallest sub-model"][0] < bought[0] <= 8 < table["whole model"][0]
    held = int(sum(numbers[1] for numbers in layers.values()))
    assert f"8 MB for one transfer of the sub-model, one way, buys {held} of 128" in printed
    assert "all modules matter alike" in printed


def test_a_model_that_reckons_with_tensors_while_it_is_built(inspect):
    status, printed, _ = inspect("regnet_x_400mf")
    assert not status
    assert "regnet_x_400mf: 5,495,976 parameters, one input is 3x224x224" in printed


def test_your_own_model_shape_and_budget(inspect, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def net():\n"
        "    return nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 4))\n"
    )
    options = ["--input-shape", "12", "--modules", "8", "--budget-memory-mb", "0.006"]
    monkeypatch.chdir(tmp_path)
    status, printed, _ = inspect("mine:net", *options)
    assert not status
    assert rows(printed)["0"][:3] == [8, 4, 4]
    assert "0.006 MB of memory while training buys 4 of 8 modules (50%)" in printed


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["resnet81"], "No model 'resnet81' in torchvision; did you mean resnet18"),
        (["resnet18", "--budget-mb", "3"], r"2,5\d\d,\d\d\d bytes of communication_bytes are miss"),
        (["resnet18", "--budget-gflop", "0"], "Expected --budget-gflop above 0"),
        (["slim-resnet", "--input-shape", "3xlarge"], "Expected a shape such as 3x224x224"),
        (["slim-resnet", "--classes", "0"], "Expected --classes of 1 or more, got 0"),
        (["resnet18", "--input-shape", "12"], "resnet18 does not take an input of 12"),
        (["vit_b_16", "--input-shape", "3x30x30"], "vit_b_16 at 30 pixels"),
        (
            ["vit_b_16", "--input-shape", "3x224"],
            "vit_b_16 does not take an input of 3x224: not en",
        ),
        (["torch.nn:Identity"], "Found no block to cut"),
        (["mobilenet_v3_small"], "'features.1' .InvertedResidual. can't be cut exactly"),
        (["no_such_module:net"], "No model from 'no_such_module:net': No module named"),
    ],
)
def test_what_the_user_can_mend_is_one_sentence(inspect, arguments, sentence):
    status, printed, error = inspect(*arguments)
    assert (status, printed) == (1, "")
    assert re.match(f"error: .*{sentence}", error), error


def test_it_runs_as_a_command_and_ends_with_a_sentence():
    command = [sys.executable, "-m", "eclm_flower", "inspect", "resnet81"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith("error: No model 'resnet81'")
    assert len(done.stderr.splitlines()) == 1


def test_help_does_not_wait_for_torch():
    code = (
        "import sys, eclm_flower.__main__ as m\n"
        "try:\n    m.cli(['inspect', '--help'])\n"
        "except SystemExit:\n    assert not {'torch', 'flwr'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True)
