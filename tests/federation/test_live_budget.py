"""The live budget follows this machine's real memory, load and link."""

import http.server
import os
import subprocess
import sys
import threading
import time

import numpy as np
import psutil
import pytest
from federated import build_model

from eclm_flower.federation import link_rate, live_budget


@pytest.fixture(scope="module")
def costs():
    return build_model(8).costs


def test_memory_is_a_share_of_what_is_available(costs):
    available = psutil.virtual_memory().available
    for share in (0.1, 0.5):
        budget = live_budget(costs, memory_share=share)
        assert budget.memory_bytes == pytest.approx(share * available, rel=0.2)


def test_memory_in_use_lowers_the_budget(costs):
    def lowered_by() -> float:
        before = live_budget(costs, memory_share=1.0).memory_bytes
        taken = np.ones(2**28 // 8)  # 256 MiB, really written to
        return (before - live_budget(costs, memory_share=1.0).memory_bytes) / taken.nbytes

    # Others on this machine take and free memory meanwhile, but not every time as much.
    assert any(lowered_by() > 0.5 for _ in range(10))


def test_a_busy_cpu_lowers_the_budget_but_never_below_a_module_in_every_layer(costs):
    busy = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"])
        for _ in range(os.cpu_count() or 1)
    ]
    try:
        time.sleep(0.5)
        budget = live_budget(costs)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    one_each = costs.of(dict.fromkeys(costs.modules, (0,)))
    half = costs.of({layer: range(number // 2) for layer, number in costs.modules.items()})
    assert one_each.computation_flops <= budget.computation_flops < half.computation_flops


def test_an_idle_cpu_can_afford_the_whole_model(costs, monkeypatch):
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: 0.0)  # none is idle in a test run
    assert live_budget(costs).computation_flops == pytest.approx(costs.whole.computation_flops)


def test_the_link_limits_communication(costs):
    assert live_budget(costs).communication_bytes == float("inf")
    budget = live_budget(costs, bytes_per_second=1000.0, transfer_seconds=3.0)
    assert budget.communication_bytes == 3000.0


@pytest.mark.parametrize(
    "wrong",
    [
        {"memory_share": 0.0},
        {"memory_share": 1.5},
        {"bytes_per_second": 0.0},
        {"bytes_per_second": float("nan")},
        {"transfer_seconds": -1.0},
    ],
)
def test_numbers_out_of_range_are_refused(costs, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        live_budget(costs, **wrong)


@pytest.fixture
def slow_server(request):
    """Serve at 1 MB/s, or what the test asks for, for 10 s."""
    rate = getattr(request, "param", 1_000_000)

    class Slow(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            try:
                for _ in range(100):
                    self.wfile.write(bytes(rate // 10))
                    time.sleep(0.1)
            except ConnectionError:
                pass  # the reader had enough

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


def test_the_rate_of_a_link_is_measured(slow_server):
    start = time.monotonic()
    rate = link_rate(slow_server, seconds=1.0)
    assert time.monotonic() - start < 3  # not until the end of the 10 MB
    assert 0.3e6 < rate < 1.5e6


@pytest.mark.parametrize("slow_server", [10_000], indirect=True)
def test_the_rate_of_a_slow_link_takes_no_longer(slow_server):
    start = time.monotonic()
    rate = link_rate(slow_server, seconds=1.0)
    assert time.monotonic() - start < 3
    assert 3e3 < rate < 1.5e4


def test_the_rate_of_a_file_is_measured(tmp_path):
    (tmp_path / "some").write_bytes(bytes(200_000))
    assert link_rate((tmp_path / "some").as_uri()) > 200_000


def test_a_link_that_leads_nowhere_is_an_error():
    with pytest.raises(OSError, match="refused"):
        link_rate("http://127.0.0.1:9/", seconds=1.0)
