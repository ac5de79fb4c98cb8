"""Runs a pipeline in forked children and sends them signals at given moments: a kill costs no new imports.

    fork_runs.py CONFIG OUTPUT_DIR SIGNALS        (run by forking_server.py)

SIGNALS is JSON such as [["distill", 0.3, ["SIGUSR2", "SIGTERM"]], …]: for each entry a child runs the whole pipeline of
CONFIG into OUTPUT_DIR, going on where the last one stopped, and gets these signals so many seconds after the stage has
begun or gone on. Who is asked to stop must leave with 75, or be done; SIGKILL comes sooner until it lands in the stage.
At last one child may finish. Prints one JSON line: what became of each child, and whether its stage was left undone.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

from hedgehog.pipeline.config import RunConfig
from hedgehog.pipeline.config_loading import load_config
from hedgehog.pipeline.errors import Interrupted
from hedgehog.pipeline.runner import run_pipeline

KILL = ["SIGKILL"]
SHORTEST_DELAY_S = 0.01


def start_child(config: RunConfig) -> int:
    """Fork a process that runs the pipeline and exits with 0, or prints its traceback and exits with 1."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        run_pipeline(config)
        status = 0
    except Interrupted as stop:
        print(stop)
        status = stop.exit_code
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def is_running(folder: Path) -> bool:
    """Whether a stage's manifest says so: it is at work, or was killed there."""
    manifest = folder / "manifest.json"
    return manifest.is_file() and '"status": "running"' in manifest.read_text()


def send_signals(config: RunConfig, root: Path, stage: str, delay_s: float, names: list[str]) -> list[object]:
    """Start a child and signal it; (stage, delay, exit status, seconds to leave, whether the stage is left undone)."""
    lease = root / stage / "lease"
    before = sorted(os.listdir(lease)) if lease.is_dir() else []
    pid = start_child(config)
    status, signalled_at = None, None
    while status is None:
        ended, code = os.waitpid(pid, os.WNOHANG)
        if ended:
            status = os.waitstatus_to_exitcode(code)
        elif signalled_at is None and lease.is_dir() and sorted(os.listdir(lease)) != before:
            if names == KILL and not is_running(root / stage):
                continue  # it holds the lease, and is about to say that it runs
            time.sleep(delay_s)
            signalled_at = time.monotonic()
            for name in names:
                os.kill(pid, signal.Signals[name])  # the child is not waited for yet: the pid is still its own
        time.sleep(0.002)
    took_s = None if signalled_at is None else round(time.monotonic() - signalled_at, 3)
    return [stage, delay_s, status, took_s, is_running(root / stage)]


def main() -> None:
    config_file, output_dir, signals = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    config = load_config(config_file, [f"output_dir={output_dir}", "engine.cpu_threads=1"])
    root = Path(output_dir) / config.name
    outcomes = []
    for stage, delay_s, names in signals:
        outcome = send_signals(config, root, stage, delay_s, names)
        while names == KILL and not outcome[-1] and delay_s > SHORTEST_DELAY_S:
            shutil.rmtree(root / stage)  # done before its moment, on a machine that has become faster: once more
            delay_s /= 2
            outcome = send_signals(config, root, stage, delay_s, names)
        outcomes.append(outcome)
        if outcome[2] not in (0, Interrupted.exit_code, -signal.SIGKILL):
            break
    _, status = os.waitpid(start_child(config), 0)
    print(json.dumps(outcomes))
    sys.exit(0 if status == 0 else 1)


if __name__ == "__main__":
    main()
