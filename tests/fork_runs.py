"""Runs a pipeline in forked children and sends them signals at given moments: a kill costs no new imports.

    fork_runs.py CONFIG OUTPUT_DIR SIGNALS        (run by forking_server.py)

SIGNALS is JSON such as [["distill", 0.3, ["SIGUSR2", "SIGTERM"]], …]: for each entry a child runs the whole pipeline of
CONFIG into OUTPUT_DIR, going on where the last one stopped, and gets these signals so many seconds after the stage has
begun or gone on. Who is asked to stop must leave with 75, or be done. At last one child may finish. Prints one JSON
line: what became of each child, and which stage it was in.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from hedgehog.pipeline.config import RunConfig
from hedgehog.pipeline.config_loading import load_config
from hedgehog.pipeline.errors import Interrupted
from hedgehog.pipeline.runner import run_pipeline


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


def stage_at_work(root: Path) -> str:
    """The stage whose manifest says running, for the report."""
    running = [m.parent for m in root.rglob("manifest.json") if '"status": "running"' in m.read_text()]
    return ",".join(sorted(str(folder.relative_to(root)) for folder in running)) or "between stages"


def send_signals(config: RunConfig, root: Path, signals: list[tuple[str, float, list[str]]]) -> list[list[object]]:
    """Start a child for each entry and signal it; (stage, delay, exit status, seconds to leave, stage hit) of each."""
    outcomes: list[list[object]] = []
    for stage, delay_s, names in signals:
        kill = names == ["SIGKILL"]
        lease = root / stage / "lease"
        before = sorted(os.listdir(lease)) if lease.is_dir() else []
        pid = start_child(config)
        status, signalled_at = None, None
        while status is None:
            ended, code = os.waitpid(pid, os.WNOHANG)
            if ended:
                status = os.waitstatus_to_exitcode(code)
            elif signalled_at is None and lease.is_dir() and sorted(os.listdir(lease)) != before:
                if kill and stage_at_work(root) != stage:
                    continue  # it holds the lease, and is about to say that it runs
                time.sleep(delay_s)
                signalled_at = time.monotonic()
                for name in names:
                    os.kill(pid, signal.Signals[name])  # the child is not waited for yet: the pid is still its own
            time.sleep(0.002)
        took_s = None if signalled_at is None else round(time.monotonic() - signalled_at, 3)
        outcomes.append([stage, delay_s, status, took_s, stage_at_work(root)])
        if status not in (0, Interrupted.exit_code, *([-signal.SIGKILL] if kill else [])):
            break
    return outcomes


def main() -> None:
    config_file, output_dir, signals = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    config = load_config(config_file, [f"output_dir={output_dir}", "engine.cpu_threads=1"])
    outcomes = send_signals(config, Path(output_dir) / config.name, signals)
    _, status = os.waitpid(start_child(config), 0)
    print(json.dumps(outcomes))
    sys.exit(0 if status == 0 else 1)


if __name__ == "__main__":
    main()
