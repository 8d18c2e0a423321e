"""Networks and data: shipped tasks by name, your own as `package.module:factory`."""

from adq_search.tasks import cifar10, digits, imagenet, mnist5k
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
    register_task,
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
    "cifar10",
    "digits",
    "imagenet",
    "import_object",
    "load_task",
    "mnist5k",
    "register_task",
    "split_indices",
    "task_names",
]
