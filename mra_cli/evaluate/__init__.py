"""What approximated attention does to the model: loss, divergence, agreement, embeddings, and tasks
that break where those figures hardly move.
"""

from mra_cli.evaluate.damage import Damage
from mra_cli.evaluate.judge import Judge
from mra_cli.evaluate.tasks import Measure, Task, TaskFigures, make_task

__all__ = ["Damage", "Judge", "Measure", "Task", "TaskFigures", "make_task"]
