import json
import logging
import shutil

import pytest
import torch
from federated import build_model, eclm_app, grid_of
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import eclm_flower.federation.checkpoint as checkpoint
from eclm_flower import ECLM, Budget
from eclm_flower.errors import CheckpointError
from eclm_flower.federation.checkpoint import CheckpointFolder

FILES = ("state.json", "tensors.safetensors")


def some(model, device):
    return Budget.share_of(model.costs, communication_bytes=(1 + device) / 4)


def smallest(model, device):
    return Budget.share_of(model.costs, communication_bytes=0.25)


def run(
    folder, rounds, *, model=None, app=None, arrays=None, config=None, evaluate=None, **options
):
    model = model or build_model()
    strategy = ECLM(model, checkpoint_dir=folder, **options)
    result = strategy.start(
        grid_of(app or eclm_app(budget=some)),
        arrays or ArrayRecord(model.state_dict()),
        num_rounds=rounds,
        timeout=5,
        train_config=config,
        evaluate_fn=evaluate,
    )
    return strategy, result


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    run(folder, 2)
    return folder


@pytest.fixture
def written_copy(written, tmp_path):
    return shutil.copytree(written, tmp_path / "copy")


@pytest.fixture
def flower_log(caplog):
    logger = logging.getLogger("flwr")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.mark.parametrize(("stop", "budget_every"), [(1, 1), (2, 3), (3, 1)])
def test_a_run_that_goes_on_equals_one_that_was_not_stopped(tmp_path, stop, budget_every):
    def evaluate(server_round, arrays):
        return MetricRecord({"sum": float(arrays["body.0.weight"].numpy().sum())})

    app = eclm_app(budget=smallest)  # so that modules differ in when they were last changed
    options = {
        "fraction_train": 0.5,
        "importance_every": 2,
        "budget_every": budget_every,
        "evaluate": evaluate,
        "app": app,
    }
    straight, expected = run(tmp_path / "straight", 4, **options)
    run(tmp_path / "stopped", stop, **options)
    resumed, result = run(tmp_path / "stopped", 4, **options)
    assert result == expected  # arrays and all histories
    assert str(resumed.profiles) == str(straight.profiles)
    assert resumed.selections == straight.selections
    assert resumed.usual == straight.usual
    assert len(resumed.usual) == sum(
        metrics["eclm-merged"] for metrics in result.train_metrics_clientapp.values()
    )
    for name in FILES:
        newest = [folder / "round-000004" / name for folder in tmp_path.iterdir()]
        assert newest[0].read_bytes() == newest[1].read_bytes()


def test_devices_that_derive_themselves_are_sent_the_selector_again(tmp_path):
    """Their memory belongs to a Flower run, and the run that goes on is a new one."""
    _, expected = run(tmp_path / "straight", 3, derive_on="device")
    run(tmp_path / "stopped", 2, derive_on="device")
    _, result = run(tmp_path / "stopped", 3, derive_on="device")
    assert result.arrays == expected.arrays
    last, sent = result.train_metrics_clientapp[3], expected.train_metrics_clientapp[3]
    assert last["eclm-merged"] == 4
    assert last["eclm-bytes-sent"] > sent["eclm-bytes-sent"]


def test_a_run_that_is_complete_returns_its_history_and_asks_nobody(written_copy):
    before = files_of(written_copy)
    seen = []
    _, again = run(written_copy, 2, app=eclm_app(seen=seen))
    _, fewer = run(written_copy, 1, app=eclm_app(seen=seen))
    assert list(again.train_metrics_clientapp) == [1, 2]
    assert again == fewer
    assert not seen
    assert files_of(written_copy) == before


def test_the_cloud_model_can_be_read_without_eclm(written):
    tensors = load_file(written / "round-000002" / "tensors.safetensors")
    state = {
        key.removeprefix("arrays.body."): tensor
        for key, tensor in tensors.items()
        if key.startswith("arrays.body.")
    }
    build_model().body.load_state_dict(state)


def test_versions_say_which_round_last_changed_each_module(tmp_path):
    strategy, _ = run(tmp_path, 2, app=eclm_app(budget=smallest), fraction_train=0.5)
    tensors = load_file(tmp_path / "round-000002" / "tensors.safetensors")
    before = load_file(tmp_path / "round-000001" / "tensors.safetensors")
    initial = build_model().state_dict()
    layer = strategy.model.layers["0"]
    for module, version in enumerate(tensors["versions.0"].tolist()):
        now, then, first = (
            layer.packed("0.weight", state[f"{prefix}body.0.weight"])[module]
            for prefix, state in (("arrays.", tensors), ("arrays.", before), ("", initial))
        )
        assert version == (0 if torch.equal(now, first) else 1 if torch.equal(now, then) else 2)
    assert set(tensors["versions.0"].tolist()) & {0, 1}  # some module is not of the last round


def test_the_last_two_are_kept_and_every_nth_and_the_last_round_is_written(tmp_path):
    run(tmp_path, 5, checkpoint_every=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round-000004", "round-000005"]


def test_what_a_killed_run_left_half_written_is_ignored_and_removed(written_copy):
    for name in (".writing-round-000003", ".removing-round-000001"):
        shutil.copytree(written_copy / "round-000002", written_copy / name)
    (written_copy / ".writing-round-000003" / "state.json").unlink()
    _, result = run(written_copy, 3)
    assert list(result.train_metrics_clientapp) == [1, 2, 3]
    assert not list(written_copy.glob(".*"))


def refused(folder, match, **options):
    before = files_of(folder)
    with pytest.raises(CheckpointError, match=match):
        run(folder, 3, **options)
    assert files_of(folder) == before


@given(data=st.data())
def test_a_checkpoint_truncated_at_any_byte_is_refused_and_left_alone(written, data):
    name = data.draw(st.sampled_from(FILES))
    whole = (written / "round-000002" / name).read_bytes()
    changed_is_refused(written, name, whole[: data.draw(st.integers(0, len(whole) - 1))])


@given(data=st.data())
def test_a_checkpoint_with_any_bit_changed_is_refused_and_left_alone(written, data):
    name = data.draw(st.sampled_from(FILES))
    content = bytearray((written / "round-000002" / name).read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    changed_is_refused(written, name, bytes(content))


def changed_is_refused(written, name, content):
    path = written / "round-000002" / name
    whole = path.read_bytes()
    try:
        path.write_bytes(content)
        with pytest.raises(CheckpointError):
            CheckpointFolder(written).load()
        assert path.read_bytes() == content
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_that_lacks_a_file_is_refused(written_copy, name):
    (written_copy / "round-000002" / name).unlink()
    refused(written_copy, "is damaged .* move it away to go on after round-000001")


def test_the_only_checkpoint_damaged_is_refused_too(tmp_path):
    run(tmp_path, 1)
    (tmp_path / "round-000001" / "state.json").write_text("{}")
    refused(tmp_path, "is damaged .* move it away to start anew")


def test_another_format_is_refused(written_copy):
    path = written_copy / "round-000002" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 1}))
    refused(written_copy, "has format 1, but this version of eclm-flower reads format 3")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"model": build_model(2)}, "another model: 'layers' was {'0': 4} and is {'0': 2} now"),
        ({"model": build_model(gating="selector")}, "another model: 'gating'"),
        ({"seed": 1}, "another setting: 'seed' was 0 and is 1 now"),
        ({"weighting": "examples"}, "another setting: 'weighting'"),
        ({"fraction_train": 0.5}, "another setting: 'fraction_train'"),
        ({"config": ConfigRecord({"lr": 0.5})}, "another setting: 'train_config'"),
        ({"query_config": ConfigRecord({"a": 1})}, "another setting: 'query_config'"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_and_left_alone(written_copy, options, match):
    refused(written_copy, match, **options)


def test_other_initial_arrays_are_not_used_and_the_log_says_so(written_copy, perturb, flower_log):
    _, expected = run(shutil.copytree(written_copy, written_copy.parent / "same"), 3)
    assert "initial arrays" not in flower_log.text
    _, result = run(written_copy, 3, arrays=ArrayRecord(perturb(build_model()).state_dict()))
    assert result == expected
    assert "The initial arrays are not those that the run started from" in flower_log.text


def test_a_folder_that_cannot_be_written_is_refused_before_the_first_round(tmp_path):
    (tmp_path / "file").write_text("")
    seen = []
    with pytest.raises(CheckpointError, match="Choose another checkpoint_dir"):
        run(tmp_path / "file", 1, app=eclm_app(seen=seen))
    assert not seen


def test_a_full_disk_costs_the_checkpoint_and_not_the_run(tmp_path, monkeypatch, flower_log):
    def full(tensors, path):
        path.write_bytes(b"some")
        if "round-000002" in str(path):
            raise OSError(28, "No space left on device")
        return save_file(tensors, path)

    save_file = checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", full)
    _, result = run(tmp_path, 3)
    assert list(result.train_metrics_clientapp) == [1, 2, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round-000001", "round-000003"]
    assert "No space left on device" in flower_log.text


def test_a_bad_interval_is_refused(tmp_path):
    with pytest.raises(ValueError, match="checkpoint_every >= 1"):
        ECLM(build_model(), checkpoint_dir=tmp_path, checkpoint_every=0)
