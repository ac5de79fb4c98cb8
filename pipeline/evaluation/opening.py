"""Which task the test rows are."""

from __future__ import annotations

from ..data.tokens import TokenizedSplit
from ..stage_context import StageContext
from .classification import ClassificationTask
from .dialogues import DialogueTask
from .regression import RegressionTask
from .task import Task
from .text import TextTask

_TASKS: dict[str, type[DialogueTask | TextTask | ClassificationTask | RegressionTask]] = {
    task.kind: task for task in (DialogueTask, TextTask, ClassificationTask, RegressionTask)
}


def open_task(ctx: StageContext) -> Task:
    """The test rows that prepare wrote.

    Raises:
        DataError: there are none.
        ConfigError: the config leaves nothing to measure, or asks for positions that the base does not have.
        CheckpointError: their file cannot be read.
    """
    prepare = ctx.inputs["prepare"]
    tokens = TokenizedSplit.open(prepare.artifact("tokens_test"))
    # before it was noted, there were dialogues only
    return _TASKS[prepare.summary.get("kind", DialogueTask.kind)](ctx, tokens)
