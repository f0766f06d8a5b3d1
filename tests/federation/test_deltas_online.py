"""Delta modules through whole rounds: what devices are sent, what becomes of it, and going on."""

import federated
import numpy as np
import pytest
import torch
from federated import build_model, eclm_app, grid_of
from flwr.app import ArrayRecord

from eclm_flower import ECLM, Budget, receive, selection_of
from eclm_flower.adaptation import Robust
from eclm_flower.federation.cache import ModuleCache
from eclm_flower.modular.selector import DELTAS

S = 3


def half(model, device):
    return Budget.share_of(model.costs, communication_bytes=0.5)


def cloud_model(*, zero=False):
    model = build_model(sub_tasks=S)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in model.add_deltas().tensors.values():
            tensor.normal_(std=0.0 if zero else 0.1, generator=generator)
        model.deltas.gates.copy_(torch.full((S, S), 0.1) + 0.7 * torch.eye(S))
    return model


def run(model, rounds=2, *, app=None, nodes=4, seen=None, **options):
    app = app or eclm_app(budget=half, sub_tasks=S, seen=seen)
    strategy = ECLM(model, fraction_evaluate=0.0, **options)
    result = strategy.start(
        grid_of(app, nodes), ArrayRecord(model.state_dict()), num_rounds=rounds, timeout=5
    )
    assert result.arrays, "nothing was merged"
    return strategy, result.arrays.to_torch_state_dict()


def test_a_device_is_sent_its_sub_model_with_the_deltas_of_its_sub_tasks():
    model, seen = cloud_model(), []
    strategy, _ = run(model, 1, seen=seen)
    device_at = {node: device for device, node in strategy.roster.node_ids.items()}
    assert len(seen) == 4
    for msg in seen:
        got = receive(msg, build_model(sub_tasks=S)).state_dict()
        mixture = strategy.mixture(strategy.profiles[device_at[msg.metadata.dst_node_id]])
        assert mixture.sum() == pytest.approx(1)
        selection = selection_of(msg)
        expected = model.deltas.merged(model.narrowed_state(selection), selection, mixture)
        plain = model.narrowed_state(selection)
        for key, tensor in got.items():
            torch.testing.assert_close(tensor, expected[key])
        assert any(not torch.allclose(got[key], plain[key]) for key in got)


def test_a_device_that_changes_nothing_changes_nothing(monkeypatch):
    model = cloud_model()
    monkeypatch.setattr(federated, "train_locally", lambda *_: 0.0)
    _, after = run(model, 1)
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(after[key], tensor, atol=1e-6, rtol=1e-5)


def test_deltas_that_are_zero_and_stay_so_are_no_deltas_to_the_last_bit():
    _, with_zeros = run(cloud_model(zero=True), delta_step=0.0)
    model = build_model(sub_tasks=S)
    _, without = run(model)
    assert set(with_zeros) - set(without) == {k for k in with_zeros if k.startswith("deltas.")}
    assert all(torch.equal(tensor, with_zeros[key]) for key, tensor in without.items())


def test_deltas_of_zero_learn():
    _, after = run(cloud_model(zero=True), 1)
    largest = max(float(after[k].abs().max()) for k in after if k.startswith("deltas.0"))
    assert largest > 1e-4


def test_a_run_goes_on_with_its_deltas_though_the_model_was_not_prepared_again(tmp_path):
    _, expected = run(cloud_model(), 2, checkpoint_dir=tmp_path / "straight")
    run(cloud_model(), 1, checkpoint_dir=tmp_path / "stopped")
    _, after = run(build_model(sub_tasks=S), 2, checkpoint_dir=tmp_path / "stopped")
    assert after.keys() == expected.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in expected.items())


def test_both_the_shared_weights_and_the_deltas_learn():
    model = cloud_model()
    before = model.state_dict()
    _, after = run(model, 2)
    for prefix in ("body.", "deltas.0", "deltas.4"):
        keys = [key for key in before if key.startswith(prefix)]
        assert keys
        assert all(not torch.equal(before[key], after[key]) for key in keys), prefix
    for key in ("deltas.gates", *(k for k in before if k.startswith("selector."))):
        assert torch.equal(before[key], after[key])


@pytest.mark.parametrize("options", [{"delta_step": 0.0}, {"robust": Robust(rule="median")}])
def test_deltas_can_be_left_as_they_are(options):
    model = cloud_model()
    before = model.state_dict()
    _, after = run(model, 2, **options)
    assert all(torch.equal(after[k], t) for k, t in before.items() if k.startswith("deltas."))
    assert any(not torch.equal(after[k], t) for k, t in before.items() if k.startswith("body."))


def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path):
    _, straight = run(cloud_model(), 3)
    run(cloud_model(), 1, checkpoint_dir=tmp_path)
    _, resumed = run(cloud_model(), 3, checkpoint_dir=tmp_path)
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[key]) for key, tensor in straight.items())


def told(device):
    return np.eye(S)[device % S] if device else [1 / S] * S


def test_a_device_that_tells_its_sub_tasks_is_believed():
    model, seen = cloud_model(), []
    app = eclm_app(budget=half, sub_tasks=S, seen=seen, mixture=told)
    strategy, _ = run(model, 1, app=app)
    device_at = {node: device for device, node in strategy.roster.node_ids.items()}
    for msg in seen:
        device, selection = device_at[msg.metadata.dst_node_id], selection_of(msg)
        got = receive(msg, build_model(sub_tasks=S)).state_dict()
        plain = model.narrowed_state(selection)
        merged = model.deltas.merged(plain, selection, told(device))
        for key, tensor in got.items():
            torch.testing.assert_close(tensor, merged[key])
            assert torch.equal(tensor, plain[key]) is (device == 0), "alike is unknown: W itself"


def test_a_delta_is_born_where_devices_tell_a_sub_task_to_spare():
    def spare(device):
        return [0, 0, 1] if device > 1 else [1, 0, 0]

    app = eclm_app(budget=half, sub_tasks=S, mixture=spare)
    _, after = run(cloud_model(zero=True), 1, app=app)
    for key, tensor in after.items():
        if key.startswith("deltas.0"):
            assert tensor[2].any()
            assert not tensor[1].any(), "nobody is of it"


def test_what_devices_tell_of_sub_tasks_is_in_a_checkpoint(tmp_path):
    app = eclm_app(budget=half, sub_tasks=S, mixture=lambda d: told(d) if d < 3 else None)
    straight, after = run(cloud_model(), 3, app=app, budget_every=9)
    run(cloud_model(), 1, app=app, budget_every=9, checkpoint_dir=tmp_path)
    resumed, again = run(cloud_model(), 3, app=app, budget_every=9, checkpoint_dir=tmp_path)
    assert all(torch.equal(tensor, again[key]) for key, tensor in after.items())
    for device, profile in straight.profiles.items():
        np.testing.assert_array_equal(profile.mixture, resumed.profiles[device].mixture)
    assert straight.profiles[3].mixture is None


def test_a_cache_changes_nothing_but_what_is_sent(tmp_path):
    _, plain = run(cloud_model(), 3)
    app = eclm_app(
        budget=half, sub_tasks=S, cache=lambda device: ModuleCache(tmp_path / str(device))
    )
    _, cached = run(cloud_model(), 3, app=app)
    assert all(torch.equal(tensor, cached[key]) for key, tensor in plain.items())


def test_changes_at_low_precision_are_changes_of_the_same_model():
    _, plain = run(cloud_model(), 1)
    _, rounded = run(cloud_model(), 1, upload_dtype=torch.float16)
    for key, tensor in plain.items():
        torch.testing.assert_close(rounded[key], tensor, atol=2e-3, rtol=1e-2)


def test_an_importance_without_sub_tasks_is_refused():
    app = eclm_app(budget=half)  # modularised without sub-tasks: its selector does not fit either
    with pytest.raises(AssertionError, match="nothing was merged"):
        run(cloud_model(), 1, app=app)


def test_sub_tasks_are_told_by_the_gates_of_the_delta_modules():
    strategy, _ = run(cloud_model(), 1)
    profile = strategy.profiles[0]
    gates = strategy.cloud.deltas.gates.numpy()
    for s in range(S):
        importance = {**profile.importance, DELTAS: gates[s]}
        told = type(profile)(device=0, budget=profile.budget, importance=importance)
        np.testing.assert_allclose(strategy.mixture(told), np.eye(S)[s], atol=1e-5)
    nothing = type(profile)(device=0, budget=profile.budget)
    assert strategy.mixture(nothing) is None
