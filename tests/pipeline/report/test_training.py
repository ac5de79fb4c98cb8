"""What the training stages really record is what the charts look for."""

from __future__ import annotations

import re

import pytest

from hedgehog.pipeline.report.writing import write_report


def test_real_stages_are_shown(new_run):
    run = new_run(data__dataset="some/rows", distill__eval_every_steps=2, finetune__eval_every_steps=2)
    run.stage("distill")
    run.stage("finetune")
    content = write_report(str(run.root)).read_text()
    for stage, value in (("distill", "validation_kl_nats"), ("finetune", "validation_loss_nats")):
        for record in run.metrics(stage)[1::2]:
            assert f"{record[value]:.4g} on validation, step {record['step']}<" in content
    for name, stage in (("kl_nats", "distill"), ("loss_nats", "finetune")):
        first, *_, last = (record[name] for record in run.metrics(stage))
        assert f"main: from {first:.4g} at step 1 to {last:.4g} at step 4" in content
    summary = run.stage("distill").summary
    for layer, (mean, kl_H) in enumerate(zip(summary["kl_per_layer"], summary["kl_per_head"], strict=True)):
        assert f"layer {layer}: {mean:.4g} (heads {min(kl_H):.4g} to {max(kl_H):.4g})" in content


@pytest.mark.parametrize(("kl", "differ"), [(2.0, False), (9.0, True)])
def test_bars_share_an_axis_unless_some_would_vanish(new_folder, drawn, kl, differ):
    new_folder.config()
    new_folder.stage("distill", summary={"layers": [0], "kl_per_layer": [1.0], "kl_per_head": [[1.0]]})
    new_folder.stage("variants/t2r/distill", summary={"layers": [0], "kl_per_layer": [kl], "kl_per_head": [[kl]]})
    content = write_report("trial").read_text()
    panels = [drawn(svg) for svg in re.findall(r'<svg viewBox="0 0 400.*?</svg>', content)]
    main, t2r = (panel.ticks("y") for panel in panels)
    assert (main != t2r) == differ == ("The vertical axes differ" in content)
