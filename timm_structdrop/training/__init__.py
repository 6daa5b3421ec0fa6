"""Training: drop schedules, cluster refits, tasks on timm.task, checkpoints and the loop."""

from timm_structdrop.training.checkpoint import Position, RunSaver, RunState
from timm_structdrop.training.choice import make_task
from timm_structdrop.training.epoch import learning_rate, train_one_epoch
from timm_structdrop.training.interrupt import TrainingStopped
from timm_structdrop.training.loop import fit
from timm_structdrop.training.parts import Loop, LoopSettings
from timm_structdrop.training.progress import Progress
from timm_structdrop.training.ranking import Ranking
from timm_structdrop.training.rblock import RBlockTask, has_fork
from timm_structdrop.training.refit import ClusterRefits
from timm_structdrop.training.resume import find_resume, resume
from timm_structdrop.training.schedule import DropSchedule, live_drop_prob, schedule_shapes
from timm_structdrop.training.seeding import derive_seed, seed_everything, set_loader_epoch
from timm_structdrop.training.summary import SummaryFile, read_summary
from timm_structdrop.training.task import StructDropTask

__all__ = [
    "ClusterRefits",
    "DropSchedule",
    "Loop",
    "LoopSettings",
    "Position",
    "Progress",
    "RBlockTask",
    "Ranking",
    "RunSaver",
    "RunState",
    "StructDropTask",
    "SummaryFile",
    "TrainingStopped",
    "derive_seed",
    "find_resume",
    "fit",
    "has_fork",
    "learning_rate",
    "live_drop_prob",
    "make_task",
    "read_summary",
    "resume",
    "schedule_shapes",
    "seed_everything",
    "set_loader_epoch",
    "train_one_epoch",
]
