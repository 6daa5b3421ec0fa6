"""Training: drop schedules, cluster refits, tasks on timm.task, checkpoints and the loop."""

from timm_structdrop.training.progress import Progress
from timm_structdrop.training.refit import ClusterRefits
from timm_structdrop.training.schedule import DropSchedule, schedule_shapes
from timm_structdrop.training.task import StructDropTask, make_task

__all__ = [
    "ClusterRefits",
    "DropSchedule",
    "Progress",
    "StructDropTask",
    "make_task",
    "schedule_shapes",
]
