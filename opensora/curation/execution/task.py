"""One item's work: the stages to run on a clip, and what comes of them. Runs in any process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

from opensora.curation.clip import Clip
from opensora.curation.execution.ledger import Result
from opensora.curation.stages.stage import Stage
from opensora.errors import OpenSoraError, UnavailableError, printable


class Task(NamedTuple):
    """Stages (by index) to run on a clip. `number` is the position of the item in the input."""

    number: int
    clip: Clip
    stages: tuple[int, ...]


class StageResult(NamedTuple):
    """The result of one stage of a task."""

    stage: int
    result: Result


# Yields results as they come, those of one task in the order of its stages.
Executor: TypeAlias = Callable[[Iterator[Task], Sequence[Stage]], Iterator[tuple[Task, StageResult]]]


def run_task(task: Task, stages: Sequence[Stage]) -> Iterator[StageResult]:
    """Runs the stages of a task in order, each with the columns of those before it; ends at the first error."""
    row = dict(task.clip.row or {})
    for index in task.stages:
        clip = Clip(task.clip.path, task.clip.span, task.clip.crop, row)
        result = run_stage(stages[index], clip)
        yield StageResult(index, result)
        if result.rows is None:
            return
        if not stages[index].splits:
            row |= result.rows[0]


def run_stage(stage: Stage, clip: Clip) -> Result:
    """The rows of a stage, or its error as one line."""
    try:
        found = stage.process(clip)
    except UnavailableError as error:
        return Result(None, printable(str(error)), lasting=False)
    except OpenSoraError as error:
        return Result(None, printable(str(error)))
    except MemoryError:
        return Result(None, f"{clip.path}: stage {stage.name} needs more memory than there is")
    except Exception as error:  # a bug on one clip must not end the run
        return Result(
            None, f"{clip.path}: stage {stage.name} failed ({type(error).__name__}: {printable(str(error))[:200]})"
        )
    return Result(found if isinstance(found, list) else [found])
