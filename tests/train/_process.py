"""One of two processes of a run; see test_processes.py.

Arguments: process, port, folder, mesh shape ("4x2"), steps, "resume" or "stop".
"""

import os
import runpy
import signal
import sys
from pathlib import Path

import jax

from autoshard.train import ByteCorpus, Trainer


def main(process, port, folder, shape, steps, mode):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(process))

    here = Path(__file__).parent
    fakes = runpy.run_path(str(here / "conftest.py"))
    step = fakes["FakeStep"](tuple(int(n) for n in shape.split("x")))

    def send(index):
        if mode == "stop" and process == "1" and index == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    step.on_step = send
    try:
        result = Trainer(
            step,
            ByteCorpus(here / "conftest.py", seq=16, batch=8),
            steps=int(steps),
            checkpoint_dir=Path(folder) / "run",
            checkpoint_every=4,
            resume=mode == "resume",
            metrics_path=Path(folder) / "metrics.jsonl",
        ).run()
    finally:
        jax.distributed.shutdown()
    fields = (result.first_step, result.last_step, result.stopped_by_signal)
    sys.stdout.write(" ".join(map(str, fields)) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
