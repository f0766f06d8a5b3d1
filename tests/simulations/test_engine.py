"""What an engine started is ended with it."""

import subprocess
import sys

import psutil

from simulations import engine


def test_who_stays_is_killed_and_who_has_just_gone_is_no_failure(monkeypatch):
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    goes, stays = (subprocess.Popen(command) for _ in range(2))
    wait = psutil.wait_procs

    def gone_just_after(processes: list[psutil.Process], timeout: float) -> tuple[list, list]:
        found = wait(processes, timeout=0)
        goes.kill()
        goes.wait()
        return found

    monkeypatch.setattr(psutil, "wait_procs", gone_just_after)
    try:
        engine._end([psutil.Process(process.pid) for process in (goes, stays)])
        assert stays.wait(timeout=20) != 0
    finally:
        stays.kill()
