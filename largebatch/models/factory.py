"""Models from torchvision and timm by name, and from user-defined functions."""

from __future__ import annotations

from types import ModuleType
from typing import Annotated, Any

from pydantic import Field
from torch import nn

from largebatch.errors import UserError, nearest
from largebatch.models.norm import convert_batch_norm
from largebatch.process.own_code import process_kept
from largebatch.section import Count, Section, call_factory
from largebatch.task import Task


def _library(name: str) -> ModuleType:
    """Import torchvision.models or timm.

    Raises:
        UserError: if it is not installed, or does not match the installed version of torch.
    """
    try:
        if name == "timm":
            import timm

            return timm
        import torchvision.models

        return torchvision.models
    # A torchvision built for another torch fails on import with a RuntimeError or an OSError.
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"model.name: {name} cannot be imported ({reason}); install the one for your torch: pip install {name}"
        ) from error


def _known(model_name: str, names: list[str], library: str) -> None:
    if model_name not in names:
        raise UserError(f"model.name: {library} has no model '{model_name}'{nearest(model_name, names)}")


def _torchvision_model(name: str, task: Task, options: dict[str, Any]) -> nn.Module:
    models = _library("torchvision")
    _known(name, models.list_models(module=models), "torchvision")
    return models.get_model(name, **{"weights": None, "num_classes": task.num_outputs, **options})


def _timm_model(name: str, task: Task, options: dict[str, Any]) -> nn.Module:
    timm = _library("timm")
    # A name may carry the tag of pretrained weights: resnet50.a1_in1k.
    _known(name.partition(".")[0], timm.list_models(), "timm")
    defaults = {"num_classes": task.num_outputs}
    if len(task.sample_shape) == 3 and task.sample_shape[0] != 3:
        defaults["in_chans"] = task.sample_shape[0]
    return timm.create_model(name, **{**defaults, **options})


class FactoryModel(Section):
    """A model from torchvision, from timm, or from a function of your own.

    A function of your own is called as ``factory(**options)``, with an additional ``task=`` (a ``largebatch.task.Task``) if it
    has a parameter of that name. Models of torchvision and timm get the data's number of classes.
    """

    name: Annotated[str, Field(pattern=r"^[\w.]+:[\w.]+$")]
    """torchvision:NAME, timm:NAME, or package.module:factory."""

    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the model or function."""

    norm_group_size: Count | None = 32
    """Number of samples over which the model's batch norms compute their statistics, independent of the batch size; null
    leaves the batch norms unchanged, with statistics over each micro-batch."""

    fallback: tuple[str, ...] = ()
    """Modules that tracking does not support, and that are therefore differentiated sample by sample, which is exact but
    slow."""

    def build(self, task: Task) -> nn.Module:
        """Return the model with its batch norms converted.

        Raises:
            UserError: if the library is missing, the model is unknown, the options are not accepted, or the result is not a
                module.
        """
        origin, _, name = self.name.partition(":")
        if origin in ("torchvision", "timm"):
            builder = _torchvision_model if origin == "torchvision" else _timm_model
            try:
                model = builder(name, task, self.options)
            except TypeError as error:
                raise UserError(f"model.options: {error}") from error
        else:
            with process_kept():
                model = call_factory(self.name, "model", self.options, {"task": task})
        if not isinstance(model, nn.Module):
            raise UserError(
                f"model.name: '{self.name}' should return a torch.nn.Module, it returned a {type(model).__name__}"
            )
        return model if self.norm_group_size is None else convert_batch_norm(model, self.norm_group_size)
