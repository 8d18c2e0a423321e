"""Networks and data: tasks by name, your own as `package.module:factory`.

Shipped tasks are found like anybody's, by the entry-point group `adq_search.tasks`: a data set's
library is imported when its task is asked for.
"""

from adq_search.tasks._base import (
    Batch,
    DatasetPart,
    Part,
    Task,
    TeacherRecipe,
    TensorPart,
    as_part,
    split_indices,
)
from adq_search.tasks._registry import (
    TaskFactory,
    import_object,
    load_task,
    task_names,
)

__all__ = [
    "Batch",
    "DatasetPart",
    "Part",
    "Task",
    "TaskFactory",
    "TeacherRecipe",
    "TensorPart",
    "as_part",
    "import_object",
    "load_task",
    "split_indices",
    "task_names",
]
