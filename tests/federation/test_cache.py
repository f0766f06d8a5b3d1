import pytest
import torch
from federated import CLASSES, FEATURES, build_model, eclm_app, grid_of
from flwr.app import ArrayRecord, ConfigRecord
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from eclm_flower import ECLM, Budget, modularize
from eclm_flower.errors import RequestError
from eclm_flower.federation.cache import ModuleCache, complete, digest, module_piece
from eclm_flower.federation.cloud import CloudModel
from eclm_flower.federation.wire import SELECTOR_PART, by_part, forms, unflattened
from eclm_flower.modular import slim_resnet
from eclm_flower.modular.model import body_of

pytestmark = pytest.mark.filterwarnings("ignore:The narrowest selector")


def cloud_of(model, **changed):
    return CloudModel.opened(model, ArrayRecord({**model.state_dict(), **changed}), version=0)


def bytes_of(arrays):
    return sum(len(array.data) for array in arrays.values())


def parts_of(model, selection):
    """What a device expects of a sub-model; see `receive`."""
    sub_model = model.sub_model(selection)
    parts = by_part(forms(body_of(sub_model).state_dict()), model.layers.values())
    if model.gating == "selector":
        parts[SELECTOR_PART] = forms(sub_model.selector.state_dict())
    return parts


def put_together(model, selection, packed, cache):
    arrays, config = packed
    return complete(arrays, ConfigRecord(config), model, parts_of(model, selection), cache)


@pytest.fixture(scope="module", params=["mlp", "slim resnet", "selector gates"])
def model(request):
    torch.manual_seed(0)
    if request.param == "mlp":
        return build_model()
    if request.param == "selector gates":
        return build_model(gating="selector")
    return modularize(slim_resnet(in_channels=1), example_input=torch.zeros(1, 1, 8, 8))


def selections(model):
    return st.fixed_dictionaries(
        {
            name: st.sets(st.integers(0, layer.modules - 1), min_size=1).map(
                lambda modules: tuple(sorted(modules))
            )
            for name, layer in model.layers.items()
        }
    )


@settings(max_examples=25)
@given(data=st.data())
def test_what_is_put_together_is_what_the_cloud_has(model, data, tmp_path_factory):
    """Over some rounds, in which the cloud changes some modules, or none, between two messages."""
    cache = ModuleCache(tmp_path_factory.mktemp("cache"))
    cloud = cloud_of(model)
    for number in range(3):
        selection = data.draw(selections(model))
        packed = cloud.pack(selection, cache.digests(model.costs.modules))
        got = put_together(model, selection, packed, cache)
        expected = unflattened(cloud.pack(selection)[0], parts_of(model, selection))
        assert got.keys() == expected.keys()
        for part, tensors in expected.items():
            assert got[part].keys() == tensors.keys()
            assert all(torch.equal(got[part][key], tensor) for key, tensor in tensors.items())

        state = dict(cloud.state)
        for layer in model.layers.values():
            changed = data.draw(st.sets(st.integers(0, layer.modules - 1)))
            for key in layer.axes:
                state[key] = state[key].clone()
                layer.packed(key, state[key])[sorted(changed)] += 1
        cloud = cloud.after(number + 1, state)


def test_only_what_changed_travels_again(tmp_path):
    model = build_model()
    cache, cloud = ModuleCache(tmp_path), cloud_of(model)
    half = {"0": (0, 2)}
    first, config = cloud.pack(half, cache.digests(model.costs.modules))
    assert first == cloud.pack(half)[0]  # nothing is held yet
    put_together(model, half, (first, config), cache)

    again, _ = cloud.pack(half, cache.digests(model.costs.modules))
    assert not again
    more, config = cloud.pack({"0": (0, 1, 2)}, cache.digests(model.costs.modules))
    assert set(more) == {"modules.float32"}
    assert more["modules.float32"].shape == (4 * FEATURES + 4 + 4 * 8,)  # of one module
    assert config["eclm.sent.0"] == [1]
    put_together(model, {"0": (0, 1, 2)}, (more, config), cache)
    assert not cloud.pack({"0": (1,)}, cache.digests(model.costs.modules))[0]

    state = {**cloud.state, "4.bias": cloud.state["4.bias"] + 1}
    shared, config = cloud.after(1, state).pack(half, cache.digests(model.costs.modules))
    assert set(shared) == {"shared.float32"}


def test_a_piece_replaces_its_older_version(tmp_path):
    cache = ModuleCache(tmp_path)
    for value in (1.0, 2.0):
        cache.put("0", 3, {"w": torch.full((2, 2), value)})
    assert [path.name for path in tmp_path.iterdir()] == ["0.3.safetensors"]
    piece = {"w": torch.full((2, 2), 2.0)}
    assert torch.equal(cache.get("0", 3, digest(piece))["w"], piece["w"])


@pytest.mark.parametrize("what", ["deleted", "truncated", "changed"])
def test_a_damaged_cache_is_not_used_and_not_reported(tmp_path, what):
    cache = ModuleCache(tmp_path)
    piece = {"w": torch.arange(6.0)}
    cache.put("", 0, piece)
    path = next(tmp_path.iterdir())
    content = path.read_bytes()
    if what == "deleted":
        path.unlink()
    else:
        path.write_bytes(content[:-5] if what == "truncated" else content[:-1] + b"\x01")
    assert cache.digests({"0": 2})["0"] == [0, 0]
    assert cache.digests({})[""] != [digest(piece)]
    with pytest.raises(RequestError, match="the shared part from the cache"):
        cache.get("", 0, digest(piece))


def test_a_digest_tells_apart_values_keys_shapes_and_kinds():
    tensor = torch.arange(4.0)
    pieces = [
        {"a": tensor},
        {"b": tensor},
        {"a": tensor.view(2, 2)},
        {"a": tensor.view(torch.int32)},
        {"a": tensor + 1},
        {"a": tensor, "b": tensor},
        {},
    ]
    assert len({digest(piece) for piece in pieces}) == len(pieces)
    assert digest({"b": tensor, "a": tensor}) == digest(pieces[5])
    assert all(0 < digest(piece) < 2**63 for piece in pieces)


def test_a_piece_is_the_same_in_the_whole_model_and_in_a_sub_model(model):
    layer = next(iter(model.layers.values()))
    state = model.body.state_dict()
    cut = {key: layer.take(key, state[key], [1, 3]) for key in layer.axes}
    assert digest(module_piece(layer, state, 3)) == digest(module_piece(layer, cut, 1))


def run(tmp_path, *, cached, rounds=4, seen=None, nodes=4, **options):
    def half(model, device):
        return Budget.share_of(model.costs, communication_bytes=0.5)

    model = build_model()
    app = eclm_app(
        budget=half,
        seen=seen,
        cache=lambda device: ModuleCache(tmp_path / str(device)) if cached else None,
    )
    strategy = ECLM(model, **options)
    result = strategy.start(grid_of(app, nodes), ArrayRecord(model.state_dict()), rounds, timeout=5)
    return strategy, result


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_a_federation_with_caches_has_the_same_numbers_and_sends_less(tmp_path, fraction):
    plain, cached = [], []
    _, without = run(tmp_path, cached=False, seen=plain, fraction_train=fraction)
    _, with_cache = run(tmp_path, cached=True, seen=cached, fraction_train=fraction)
    for key, array in without.arrays.items():
        assert array.data == with_cache.arrays[key].data
    assert without.evaluate_metrics_clientapp == with_cache.evaluate_metrics_clientapp
    sent = [sum(bytes_of(msg.content["arrays"]) for msg in seen) for seen in (plain, cached)]
    assert sent[1] < sent[0]


def test_a_cache_of_an_older_run_is_stale_and_harmless(tmp_path):
    _, fresh = run(tmp_path / "fresh", cached=True)
    run(tmp_path / "stale", cached=True, rounds=1, seed=7)
    _, stale = run(tmp_path / "stale", cached=True)
    assert all(array.data == stale.arrays[key].data for key, array in fresh.arrays.items())


def test_a_cache_of_another_model_is_as_good_as_none(tmp_path):
    other = modularize(
        nn.Sequential(nn.Linear(FEATURES, 16), nn.ReLU(), nn.Linear(16, CLASSES)),
        modules_per_layer=8,
        example_input=torch.zeros(1, FEATURES),
    )
    for device in range(4):
        cache, cloud = ModuleCache(tmp_path / str(device)), cloud_of(other)
        packed = cloud.pack({"0": (0, 5)}, cache.digests(other.costs.modules))
        put_together(other, {"0": (0, 5)}, packed, cache)
    _, without = run(tmp_path / "none", cached=False)
    _, result = run(tmp_path, cached=True)
    assert all(array.data == result.arrays[key].data for key, array in without.arrays.items())


def test_a_device_that_reports_a_cache_must_use_it(tmp_path):
    model = build_model()
    queries = [ModuleCache(tmp_path)] * 2  # who it is, and its profile
    app = eclm_app(cache=lambda device: queries.pop() if queries else None)
    strategy = ECLM(model, min_train_nodes=1, min_available_nodes=1, fraction_evaluate=0.0)
    result = strategy.start(grid_of(app, 1), ArrayRecord(model.state_dict()), 1, timeout=5)
    assert result.train_metrics_clientapp[1]["eclm-failed"] == 1
    assert not queries
