"""All tasks by name: `config.task.name` chooses one."""

from __future__ import annotations

from dataclasses import dataclass

from lmjax.tasks.chat import Chat
from lmjax.tasks.classification import Classification
from lmjax.tasks.embeddings import Embeddings
from lmjax.tasks.grpo import Grpo
from lmjax.tasks.pairs import Pairs
from lmjax.tasks.preferences import Preferences
from lmjax.tasks.questions import Questions
from lmjax.tasks.tagging import Tagging


@dataclass(frozen=True)
class LanguageModeling:
    """No task: the model learns the texts of `data.sources` by `data.objective`."""

    name: str = ""


AnyTask = (LanguageModeling | Chat | Classification | Embeddings | Grpo | Pairs | Preferences
           | Questions | Tagging)
