"""How robust a model is: tasks, attack protocols, the runner that goes on after a kill, checks, and the report."""

from aft.evaluation.planned import Planned
from aft.evaluation.protocols import PROTOCOLS, Protocol, plan
from aft.evaluation.retrieval import Retrieval
from aft.evaluation.rounds import evaluate
from aft.evaluation.runner import Cell, Place
from aft.evaluation.subsets import first, nested_order
from aft.evaluation.tasks import Classification, RightLast, Task

__all__ = [
    "Cell", "Classification", "PROTOCOLS", "Place", "Planned", "Protocol", "Retrieval", "RightLast", "Task",
    "evaluate", "first", "nested_order", "plan",
]  # fmt: skip
