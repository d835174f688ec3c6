import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("_process.py")


def run_two(folder, shape, steps, mode):
    """What the two processes wrote on standard output: first, last, signal."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = str(SCRIPT.parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    running = [
        subprocess.Popen(
            [sys.executable, SCRIPT, *map(str, (n, port, folder, shape, steps, mode))],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in range(2)
    ]
    try:
        done = [process.communicate(timeout=120) for process in running]
    finally:
        for process in running:
            process.kill()
    for process, (_, errors) in zip(running, done, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return [output.splitlines()[-1].split() for output, _ in done]


@pytest.mark.slow
def test_two_processes_stop_together_and_go_on_with_another_mesh(tmp_path):
    first, second = run_two(tmp_path, "4x2", 100000, "stop")
    assert first == second
    stopped_at = int(first[1])
    assert first[0] == "0"
    assert first[2] == "15"
    assert 5 < stopped_at < 100000

    steps = stopped_at + 3
    for got in run_two(tmp_path, "2x4", steps, "resume"):
        assert got == [str(stopped_at), str(steps), "None"]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(steps))
