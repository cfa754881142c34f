"""Generation of text by a model with a cache: sampling, scheduling, and the compiled programs, laid out by plans."""

from pipelines.generation.programs import CachedModel, Compilation, GenerationPrograms, Plans, Sizes
from pipelines.generation.sampling import RowSettings, SamplingParams, sample
from pipelines.generation.scheduler import Scheduler, Sequence, Shape

__all__ = [
    "CachedModel",
    "Compilation",
    "GenerationPrograms",
    "Plans",
    "RowSettings",
    "SamplingParams",
    "Scheduler",
    "Sequence",
    "Shape",
    "Sizes",
    "sample",
]
