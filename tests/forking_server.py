"""A process that has imported the project and its slow libraries, and forks a child for who wants to run a script.

One serves all workers of a test session, so that the imports, some eight seconds, are paid once. `connect` starts it;
it ends some seconds after the last connection is closed.

Protocol on a Unix socket: a line of JSON {"script", "arguments", "environment", "output"}. The child answers with its
process id, is the leader of a session of its own, and at its end with its exit status.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

LINGER_S = 10.0
START_TIMEOUT_S = 120.0


def connect(place: Path, environment: Mapping[str, str] | None = None) -> socket.socket:
    """A connection to the session's server at `place`, which is started if there is none, with this environment.

    Raises:
        RuntimeError: the server did not come up; with what it said.
    """
    address, log = str(place / "forking.sock"), place / "forking.log"
    with open(place / "forking.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with contextlib.suppress(OSError):
            return _connected(address)
        Path(address).unlink(missing_ok=True)
        with open(log, "w") as output:
            command = [sys.executable, __file__, address]
            streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
            server = subprocess.Popen(command, **streams, env=environment, start_new_session=True)
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and server.poll() is None:
            with contextlib.suppress(OSError):
                return _connected(address)
            time.sleep(0.05)
        server.kill()
    raise RuntimeError(f"the forking server did not start: {log.read_text()}")


def _connected(address: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(address)
    except OSError:
        connection.close()
        raise
    return connection


def run_forked(
    place: Path, script: Path, arguments: Sequence[str], environment: Mapping[str, str], timeout_s: float = 900
) -> tuple[int, str]:
    """Run a Python script in a forked child of the server at `place`; its exit status (-9: killed) and output.

    The child and all that it started are gone when this returns, however it returns. Raises TimeoutError, with what
    was printed until then.
    """
    with connect(place) as connection, tempfile.NamedTemporaryFile("r") as output:
        request = {"script": str(script), "arguments": list(arguments), "environment": dict(environment)}
        connection.sendall(json.dumps({**request, "output": output.name}).encode() + b"\n")
        answers = connection.makefile()
        pid = int(answers.readline())
        try:
            connection.settimeout(timeout_s)
            status = answers.readline()
        except TimeoutError:
            said = output.read()
            raise TimeoutError(f"{script.name} was not done after {timeout_s:.0f} s\n{said[-6000:]}") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        return int(status or -signal.SIGKILL), output.read()


def serve(address: str) -> None:
    """Fork a child for each connection that asks for one, until nobody is connected any more."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are not waited for
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    connections: list[socket.socket] = []
    idle_since = time.monotonic()
    while connections or time.monotonic() - idle_since < LINGER_S:
        ready, _, _ = select.select([listener, *connections], [], [], 1.0)
        for connection in ready:
            if connection is listener:
                connections.append(listener.accept()[0])
                continue
            request = connection.makefile().readline()
            if request and os.fork() == 0:
                for other in (listener, *connections):
                    if other is not connection:
                        other.close()
                _become(connection, json.loads(request))
            connections.remove(connection)
            connection.close()
        if connections:
            idle_since = time.monotonic()


def _become(connection: socket.socket, request: dict[str, Any]) -> NoReturn:
    """In the child: run the script, and leave."""
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    connection.sendall(f"{os.getpid()}\n".encode())
    os.environ.clear()
    os.environ.update(request["environment"])
    with open(request["output"], "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [request["script"], *request["arguments"]]
    if (folder := os.path.dirname(request["script"])) != os.path.dirname(os.path.abspath(__file__)):
        sys.path.insert(0, folder)  # as for any script; but this folder has a `kernels` of its own
    leader = os.getpid()
    status = 1
    try:
        runpy.run_path(request["script"], run_name="__main__")
        status = 0
    except SystemExit as leaving:
        status = int(leaving.code) if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        if os.getpid() == leader:  # and not a child that the script forked
            with contextlib.suppress(OSError):
                connection.sendall(f"{status}\n".encode())
        os._exit(status)


if __name__ == "__main__":
    sys.path.pop(0)  # this folder has a `kernels` of its own

    import deepspeed  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers  # noqa: F401

    import hedgehog.stages.distill
    import hedgehog.stages.evaluate
    import hedgehog.stages.export
    import hedgehog.stages.finetune
    import hedgehog.stages.prepare  # noqa: F401
    from hedgehog.pipeline.deepspeed_import import import_deepspeed

    import_deepspeed()
    torch.set_num_threads(1)
    gc.freeze()  # children need not look through all that to find garbage, and share its pages
    serve(sys.argv[1])
