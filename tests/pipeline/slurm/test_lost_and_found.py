"""What goes wrong around submission: answers that get lost, jobs that come back, the user's environment."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from pathlib import Path

import pytest

from hedgehog.pipeline.errors import ConfigError, LeaseError
from hedgehog.pipeline.lease import acquire
from hedgehog.pipeline.slurm import cancelling, queue_lease, scheduler, submission
from hedgehog.pipeline.slurm.cancelling import cancel
from hedgehog.pipeline.slurm.job_records import JobRecord, JobRecords
from hedgehog.pipeline.slurm.scheduler import DoubtfulSubmission, scancel, submission_environment
from hedgehog.pipeline.slurm.submission import submit
from hedgehog.pipeline.status import read_status

ONE = ["variants.soft=", "slurm.layer_groups=1"]


def recorded() -> dict:
    return json.loads(Path("runs/trial/slurm/jobs.json").read_text())


def test_a_job_whose_answer_got_lost_is_found(slurm, write_config):
    slurm.lose_next_answer()
    submit("trial.yaml", ONE, last="distill")
    assert [job["job_id"] for job in recorded()["jobs"]] == ["101", "102"] and recorded()["intents"] == []
    assert slurm.submissions()["distill"]["dependency"] == "afterok:101"


@pytest.mark.parametrize("after", ["submit", "cancel", "status"])
def test_a_job_that_was_placed_without_a_record_is_adopted(slurm, write_config, after):
    slurm.lose_next_answer()
    slurm.fail("squeue", "Unable to contact slurm controller", where="%k")
    with pytest.raises(DoubtfulSubmission, match="run the same command again, it will find out"):
        submit("trial.yaml", ONE, last="distill")
    assert recorded()["jobs"] == []
    slurm.works_again()
    slurm.forget_calls()
    if after == "submit":
        submit("trial.yaml", ONE, last="distill")
        assert slurm.submissions() == {"distill": {"kill-on-invalid-dep": "yes", "dependency": "afterok:101"}}
    elif after == "cancel":
        cancel("trial")
        assert slurm.calls("scancel") == [["101"]]
    else:
        assert read_status("trial").stages[0].job == "101"


def test_a_stop_while_sbatch_is_at_work_leaves_a_trace(slurm, write_config, monkeypatch):
    def interrupted(*arguments, **settings):
        placed(*arguments, **settings)
        raise KeyboardInterrupt

    placed = submission.sbatch
    with monkeypatch.context() as patch:
        patch.setattr(submission, "sbatch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            submit("trial.yaml", ONE, last="prepare")
    submit("trial.yaml", ONE, last="prepare")
    assert len(slurm.calls("sbatch")) == 1
    assert [job["job_id"] for job in recorded()["jobs"]] == ["101"] and recorded()["intents"] == []


def test_a_timeout_is_no_refusal(write_config, slurm, monkeypatch):
    script = Path("a.sbatch")
    script.write_text("#!/bin/bash\n")

    def hang(*arguments, **settings):
        raise subprocess.TimeoutExpired("sbatch", 60)

    monkeypatch.setattr(subprocess, "run", hang)
    with pytest.raises(DoubtfulSubmission, match=r"(?s)no answer in 60 s.*may have been submitted") as doubt:
        scheduler.sbatch(script, [], stage="prepare", settings={})
    assert "refused" not in str(doubt.value)


def test_a_refused_job_leaves_no_intent_and_a_users_comment_stays(slurm, write_config):
    slurm.fail("sbatch", "Invalid qos specification")
    lines = ["slurm.sbatch_lines=[--comment=mine]"]
    with pytest.raises(ConfigError, match="qos"):
        submit("trial.yaml", [*ONE, *lines], last="prepare")
    assert recorded()["intents"] == []
    slurm.works_again()
    submit("trial.yaml", [*ONE, *lines], last="prepare")
    (comment,) = [word for word in slurm.calls("sbatch")[-1] if word.startswith("--comment=")]
    assert comment == f"--comment=mine {recorded()['jobs'][0]['token']}"


def test_a_job_that_is_being_queued_again_is_not_submitted_twice(slurm, write_config, monkeypatch):
    monkeypatch.setattr(submission, "_POLL_S", 0.0)
    submit("trial.yaml", ONE, last="prepare")
    slurm.set(_101="COMPLETING")
    slurm.after_a_look(_101="PENDING")
    slurm.forget_calls()
    submit("trial.yaml", ONE, last="prepare")
    assert slurm.calls("sbatch") == [] and len(slurm.calls("squeue")) == 2


def test_cancel_takes_out_a_job_that_is_being_queued_again(slurm, write_config):
    submit("trial.yaml", ONE, last="prepare")
    slurm.set(_101="COMPLETING")
    cancel("trial")
    assert slurm.calls("scancel") == [["101"]]
    slurm.fail("scancel", "scancel: error: Kill job error on job id 101: Job/step already completing or completed")
    scancel(["101"])


def test_the_users_environment_does_not_overrule_the_script(slurm, write_config, monkeypatch):
    for name in ("EXPORT", "SIGNAL", "NO_REQUEUE", "WAIT", "ACCOUNT", "TIMELIMIT", "PARTITION", "MEM_PER_NODE"):
        monkeypatch.setenv(f"SBATCH_{name}", "NONE")
    for name in ("SQUEUE_STATES", "SACCT_FORMAT", "SCANCEL_INTERACTIVE"):
        monkeypatch.setenv(name, "x")
    submit("trial.yaml", ONE, last="prepare")
    seen = [name for name in slurm.environment if name.startswith(("SBATCH_", "SQUEUE_", "SACCT_", "SCANCEL_"))]
    assert seen == ["SBATCH_PARTITION"], "the only one that the script leaves open"
    assert submission_environment({"SBATCH_PARTITION": "p"}, ["-p"]) == {}
    assert submission_environment({"SBATCH_PARTITION": "p"}) == {"SBATCH_PARTITION": "p"}
    submit("trial.yaml", ONE, last="prepare")
    assert "--all" in slurm.calls("squeue")[-1]


def test_a_cancel_beside_a_submit_is_refused_and_then_misses_nothing(slurm, write_config, monkeypatch):
    placed = submission.sbatch

    def beside(*arguments, **settings):
        with pytest.raises(LeaseError, match=r"runs/trial/slurm is in use"):
            cancel("trial")
        return placed(*arguments, **settings)

    monkeypatch.setattr(submission, "sbatch", beside)
    submit("trial.yaml", ONE, last="distill")
    assert slurm.calls("scancel") == []
    cancel("trial")
    assert slurm.calls("scancel") == [["102", "101"]]


def test_no_submit_beside_a_cancel(slurm, write_config, monkeypatch):
    submit("trial.yaml", ONE, last="prepare")
    cancelled = cancelling.scancel

    def beside(jobs):
        with pytest.raises(LeaseError, match=r"runs/trial/slurm is in use"):
            submit("trial.yaml", ONE, last="distill")
        cancelled(jobs)

    monkeypatch.setattr(cancelling, "scancel", beside)
    cancel("trial")
    assert slurm.calls("scancel") == [["101"]] and len(slurm.calls("sbatch")) == 1


def test_cancel_records_what_it_found_and_tells_of_what_it_did_not(slurm, write_config, capsys):
    slurm.lose_next_answer()
    slurm.fail("squeue", "Unable to contact slurm controller", where="%k")
    with pytest.raises(DoubtfulSubmission):
        submit("trial.yaml", ONE, last="prepare")
    slurm.works_again()
    slurm.set(_101="")
    cancel("trial")
    assert "no answer about the job of prepare, and shows none now" in capsys.readouterr().out
    slurm.set(_101="PENDING")
    cancel("trial")
    assert slurm.calls("scancel") == [["101"]]
    assert [job["job_id"] for job in recorded()["jobs"]] == ["101"] and recorded()["intents"] == []


def test_cancel_where_nothing_was_submitted_makes_no_folder(slurm, write_config, finish, capsys):
    finish("prepare")
    cancel("trial")
    assert "nothing was submitted" in capsys.readouterr().out and not Path("runs/trial/slurm").exists()


def test_a_full_disk_does_not_keep_jobs_in_the_queue(slurm, write_config, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    submit("trial.yaml", ONE, last="prepare")
    monkeypatch.setattr(queue_lease, "acquire", full)
    cancel("trial")
    assert slurm.calls("scancel") == [["101"]] and "Cancels all the same" in capsys.readouterr().out


def test_in_an_allocation_of_salloc_a_submit_stays_its_own(slurm, write_config, monkeypatch):
    allocation = {"SLURM_JOB_ID": "7", "SLURM_JOBID": "7", "SLURM_NTASKS": "4", "SLURM_CPUS_PER_TASK": "2"}
    allocation |= {"SLURM_MEM_PER_NODE": "1", "SALLOC_PARTITION": "debug", "CUDA_VISIBLE_DEVICES": "3"}
    for name, value in {**allocation, "SLURM_CONF": "/etc/slurm.conf"}.items():
        monkeypatch.setenv(name, value)
    placed = submission.sbatch

    def twice(*arguments, **settings):
        with pytest.raises(LeaseError, match=rf"in use \(process {os.getpid()} .*`kill {os.getpid()}`") as refused:
            submit("trial.yaml", ONE, last="prepare")
        assert "scancel" not in str(refused.value) and "job 7" not in str(refused.value)
        return placed(*arguments, **settings)

    monkeypatch.setattr(submission, "sbatch", twice)
    submit("trial.yaml", ONE, last="prepare")
    assert slurm.environment["SLURM_CONF"] == "/etc/slurm.conf" and not slurm.environment.keys() & allocation.keys()


def test_another_clusters_job_with_the_same_id_is_left_alone(slurm, write_config):
    submit("trial.yaml", ONE, last="prepare")
    slurm.belongs_to_somebody_else("101")
    slurm.set(_101="RUNNING")
    assert read_status("trial").stages[0].state == "not started"
    cancel("trial")
    assert slurm.calls("scancel") == []
    submit("trial.yaml", ONE, last="prepare")
    assert [job["job_id"] for job in recorded()["jobs"]] == ["101", "102"]


@pytest.mark.parametrize("changed", [{"name": "trial.prepare"}, {"comment": "SAME"}], ids=["comment", "name"])
def test_a_job_whose_name_or_comment_was_changed_is_still_ours(slurm, write_config, changed):
    submit("trial.yaml", ONE, last="prepare")
    comment = recorded()["jobs"][0]["token"] if "comment" in changed else "a site's own"
    slurm.belongs_to_somebody_else("101", name=changed.get("name", "renamed"), comment=comment)
    submit("trial.yaml", ONE, last="prepare")
    assert len(slurm.calls("sbatch")) == 1
    cancel("trial")
    assert slurm.calls("scancel") == [["101"]]


def test_a_users_own_job_name_is_known(slurm, write_config):
    submit("trial.yaml", [*ONE, "slurm.sbatch_lines=[-J mine]"], last="prepare")
    assert recorded()["jobs"][0]["slurm_name"] == "mine"


@pytest.mark.parametrize("line", ["--clusters=far", "-M far", "--mail-type=FAIL -Mfar", "--cluster far"])
def test_another_cluster_is_refused(slurm, write_config, line):
    write_config(slurm={"sbatch_lines": [line]})
    with pytest.raises(ConfigError, match=r"slurm\.sbatch_lines \(line 11\): .*another cluster"):
        submit("trial.yaml")


def test_a_submit_that_lost_its_lease_submits_and_writes_nothing_more(slurm, write_config, monkeypatch):
    real = submission.sbatch
    records = Path("runs/trial/slurm/jobs.json")
    before: list[str] = []

    def overtaken(*arguments, **settings):
        job_id = real(*arguments, **settings)
        (lease,) = Path("runs/trial/slurm/lease").glob("*.json")
        lease.rename(lease.with_name("00000002.json"))
        before.append(records.read_text())
        return job_id

    monkeypatch.setattr(submission, "sbatch", overtaken)
    with pytest.raises(LeaseError, match="another process has taken over"):
        submit("trial.yaml", ONE)
    assert len(slurm.calls("sbatch")) == 1 and records.read_text() == before[0]


def test_no_sbatch_where_the_lease_went_before_it(slurm, write_config, monkeypatch):
    lease = acquire(Path("runs/trial/slurm"))
    plan = submission.look_at_run(submission.load_run("trial.yaml", ONE), "trial.yaml", ONE)
    plan.lease = lease
    monkeypatch.setattr(
        submission, "write_records", lambda *_: lease_file.rename(lease_file.with_name("00000002.json"))
    )
    (lease_file,) = Path("runs/trial/slurm/lease").glob("*.json")
    with pytest.raises(LeaseError, match="another process has taken over"):
        submission.submit_plan(plan, [])
    assert slurm.calls("sbatch") == []


def test_parts_of_an_earlier_grouping_are_forgotten():
    def record(job_id: str, elements: dict[int, str], parts: list[str]) -> JobRecord:
        return JobRecord(
            name="distill", stage="distill", job_id=job_id, elements=elements, parts=parts, script="s", submitted_at="t"
        )

    two = record("1", {0: "0-4", 1: "5-7"}, ["0-4", "5-7"])
    four = record("2", {0: "0-3", 1: "4"}, ["0-3", "4", "5-7"])
    newest = [(job.job_id, index) for job, index in JobRecords(jobs=[two, four]).newest()]
    assert newest == [("1", 1), ("2", 0), ("2", 1)]
    old = record("2", {0: "0-3"}, [])
    assert len(list(JobRecords(jobs=[two, old]).newest())) == 3, "records without a grouping keep all"
