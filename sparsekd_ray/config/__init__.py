"""The tree of settings: what a run computes (identity) and, apart from that, where and how it runs (execution).

Everything outside `Execution` changes the numbers and is fingerprinted, stage by stage, in `cascade/fingerprint.py`.
Nothing inside `Execution` is. A YAML file, such as those of `sparsekd_ray/configs/`, holds only settings that differ
from the defaults. Dotted options on the command line override both: defaults < YAML < `--distill.lr 3e-4`.
"""

from sparsekd_ray.config.base import Allocation, Control, Method, Settings
from sparsekd_ray.config.execution import Card, Execution
from sparsekd_ray.config.file import explain, load, parse, shipped
from sparsekd_ray.config.method import Baseline, Calibrate, Cascade, Distill, Evaluate, Prune, Round, Teacher
from sparsekd_ray.config.model import Model, Shape, Standin
from sparsekd_ray.config.text import Corpus, Source
from sparsekd_ray.config.tree import Config

__all__ = [
    "Allocation",
    "Baseline",
    "Calibrate",
    "Card",
    "Cascade",
    "Config",
    "Control",
    "Corpus",
    "Distill",
    "Evaluate",
    "Execution",
    "Method",
    "Model",
    "Prune",
    "Round",
    "Settings",
    "Shape",
    "Source",
    "Standin",
    "Teacher",
    "explain",
    "load",
    "parse",
    "shipped",
]
