"""Where the page is written, through the command line."""

from __future__ import annotations

import errno
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from hedgehog.pipeline.report.writing import write_report

from .reading import invoke, read


def test_the_command_says_where_the_page_is(finished):
    result = invoke("trial")
    assert (result.exit_code, result.stdout) == (0, "runs/trial/report.html\n")
    other = invoke("runs/trial", "--output", "elsewhere/my.html")
    assert (other.exit_code, other.stdout) == (0, "elsewhere/my.html\n")
    without_time = [re.sub(r"on [-0-9 :]+ UTC", "", file.read_text()) for file in map(Path, other.stdout.split())]
    assert without_time == [re.sub(r"on [-0-9 :]+ UTC", "", Path("runs/trial/report.html").read_text())]


def test_an_earlier_page_is_replaced_and_nothing_else_is_left(finished):
    file = Path("runs/trial/report.html")
    file.write_text("old")
    before = {path for path in Path("runs").rglob("*")}
    assert invoke("trial").exit_code == 0
    assert file.read_text() != "old" and {path for path in Path("runs").rglob("*")} == before


def test_mistakes_are_one_message_with_a_cure(new_folder, tmp_path):
    missing = invoke("nowhere")
    assert missing.exit_code == 2 and "nowhere: no run folder" in missing.stderr
    new_folder.config()
    nothing = invoke("trial")
    assert nothing.exit_code == 2 and not list(Path("runs").rglob("*.html"))
    assert nothing.stderr == (
        "error: runs/trial: nothing to report yet, no stage of this run has begun. "
        "`hedgehog run runs/trial/config.resolved.yaml` begins it.\n"
    )
    new_folder.stage("prepare")
    folder = invoke("trial", "--output", tmp_path)
    assert folder.exit_code == 2 and f"{tmp_path} is a folder: name a file in it" in folder.stderr
    (tmp_path / "file").write_text("x")
    below = invoke("trial", "--output", tmp_path / "file" / "report.html")
    assert below.exit_code == 2 and "cannot be written" in below.stderr
    assert "hedgehog report trial --output FILE" in below.stderr


def test_output_in_a_folder_that_may_not_be_entered(finished, forbid):
    Path("private").mkdir()
    Path("runs/trial").rename("runs/my trial")
    forbid("private")
    result = invoke("my trial", "--output", "private/report.html")
    assert result.exit_code == 2
    assert result.stderr == (
        "error: private/report.html: cannot be written (Permission denied). "
        "Give another place: hedgehog report 'my trial' --output FILE\n"
    )


def test_output_follows_a_link(finished):
    Path("elsewhere").mkdir()
    Path("elsewhere/real.html").write_text("old")
    Path("link.html").symlink_to("elsewhere/real.html")
    Path("new.html").symlink_to("elsewhere/new.html")
    for name in ("link", "new"):
        assert invoke("trial", "--output", f"{name}.html").stdout == f"{name}.html\n"
        assert Path(f"{name}.html").is_symlink()
    assert read(Path("elsewhere/real.html")).tag == read(Path("elsewhere/new.html")).tag == "html"
    Path("loop").symlink_to("loop")
    assert "cannot be written (Too many levels of symbolic links)" in invoke("trial", "--output", "loop").stderr


def test_output_is_no_folder_and_no_device(finished):
    os.mkfifo("pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        for name in ("pipe", "socket", "/dev/null"):
            result = invoke("trial", "--output", name)
            assert result.exit_code == 2 and f"{name} is no ordinary file" in result.stderr
    assert "goes to a file, not to the terminal" in invoke("trial", "--output", "-").stderr
    for name in ("new/", "new folder/"):
        result = invoke("trial", "--output", name)
        assert result.exit_code == 2 and "is a folder: name a file in it" in result.stderr
        assert result.stderr.endswith(f"--output {shlex.quote(name + 'report.html')}\n")
    assert sorted(path.name for path in Path().iterdir()) == ["pipe", "runs", "socket"]


def test_a_folder_that_may_not_be_written_in(finished, monkeypatch):
    """As root every folder may be, so the refusal is the operating system's word, not its deed."""
    earlier = write_report("trial").read_text()

    def refuse(*_: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("hedgehog.pipeline.run_folder.os.replace", refuse)
    result = invoke("trial")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: runs/trial/report.html: cannot be written (Read-only file system).")
    assert Path("runs/trial/report.html").read_text() == earlier
    assert not list(Path("runs").rglob("*.partial"))


def test_a_login_node_without_torch_writes_it(finished):
    code = (
        "import sys\nsys.modules['torch'] = None\nfrom hedgehog.pipeline.cli import app\n"
        "app(['report', 'trial'], standalone_mode=False)\nprint('transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "runs/trial/report.html\nFalse\n"), done.stderr
