"""Data, models and losses of tasks."""

from largebatch.task import Task

N = 4
REGRESSION, CLASSES, TOKENS = (
    Task("regression", (3,), 1),
    Task("classification", (3,), 5),
    Task("language_modeling", (6,), 5),
)
