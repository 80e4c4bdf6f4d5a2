"""``evaluation``: tasks of lm-evaluation-harness that the trained model is measured by."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from fsdpq.recipe.options import Options

TaskName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+()-]*$", max_length=200)]


class EvaluationOptions(Options):
    """Tasks of lm-evaluation-harness; rows to hold out are in ``data``."""

    tasks: tuple[TaskName, ...] = Field(
        default=(), max_length=100, examples=[["hellaswag", "arc_easy"]]
    )
    """Tasks, groups and tags by their names in lm-evaluation-harness, run when training is over.
    Needs the package ``lm_eval``. Names only: a recipe cannot bring a task of its own."""

    num_fewshot: int | None = Field(default=None, ge=0)
    """Examples before each question; null is what the task says."""

    limit: int | None = Field(default=None, ge=1)
    """Use so many questions of every task at most; null is all. To try a task out."""

    batch_size: int | None = Field(default=None, ge=1)
    """Questions that one rank computes at once; null is ``training.micro_batch_size``."""

    apply_chat_template: bool = False
    """Ask in the model's chat template."""
