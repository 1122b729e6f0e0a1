"""The parameters that are exempt from weight decay, by the module that holds them and by their role in it.

The number of dimensions is not enough: a layer norm over (c, h, w) and a bias of shape (1, c, 1, 1) have several.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from largebatch.errors import UserError
from largebatch.moments import is_shadow

LISTED = "named by no_weight_decay()"

# Modules whose weights are matrices whatever their shape: that of a linear layer with one output has the shape (1, c).
_MAPS = (
    nn.Linear,
    nn.Bilinear,
    nn.modules.conv._ConvNd,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
)
_NORM = re.compile(r"[Nn]orm(?!al(?!i[sz]))")  # no Normal
_MAP = re.compile(r"Linear|Conv|Embed|Attention|Mlp|MLP|Head|Block|Layer(?!Norm)|Net|Model|Proj|Encod|Decod|Former")
_BIAS = re.compile(r"(^|_)bias(es)?(_|$)")
_TOKEN = re.compile(r"(^|_)tokens?(_\d+)?$|^(cls|class)_embed(ding)?$")
_POSITION = re.compile(r"(^|_)(w?pe|pos|positions?|positional)(_|$)")
_TABLE = re.compile(r"Embed|Encod")
_POSITIONAL = re.compile(r"Position(?![Ww]ise)")  # a position-wise layer is the same at every position
_PARAMETRIZED = re.compile(r"(^|\.)parametrizations\.(\w+)\.original(\d*)$")


def undecayed(model: nn.Module) -> dict[str, str]:
    """Return the trained parameters that are exempt from weight decay, each with its role.

    They are: every bias; every parameter of a normalisation layer, by its class; class tokens and other tokens; position
    embeddings; parameters of at most one dimension; others with at most one dimension larger than 1 that are no weight (a
    layer scale (c, 1, 1), a slope); and parameters that a method ``no_weight_decay()`` of the model or of a submodule names,
    as in timm's models. A parameter with several names is exempt if one of them is.

    Args:
        model: the model, tracked or not.

    Returns:
        {name: "bias", "norm", "token", "position embedding", "scale" or `LISTED`}.

    Raises:
        UserError: if a no_weight_decay() fails, or does not return names.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    listed = {f"{path}.{name}" if path else name for path, module in modules.items() for name in _listed(path, module)}
    found: dict[Tensor, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if is_shadow(parameter):
            continue
        role = _role(name, parameter, modules) or (LISTED if name in listed else None)
        if role is not None:
            found.setdefault(parameter, role)
    return {name: found[p] for name, p in model.named_parameters() if p.requires_grad and p in found}


def _listed(path: str, module: nn.Module) -> set[str]:
    method: Callable[[], Any] | None = getattr(module, "no_weight_decay", None)
    if not callable(method):
        return set()
    where = f"model: no_weight_decay() of {f'{path!r} ' if path else ''}({type(module).__name__})"
    try:
        names = method()
    except Exception as error:
        raise UserError(f"{where} fails: {type(error).__name__}: {error}") from error
    if not isinstance(names, set | frozenset | list | tuple | dict) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{where}: expected a set of parameter names, got {type(names).__name__}: {names!r}")
    return set(names)


def _role(name: str, parameter: Tensor, modules: dict[str, nn.Module]) -> str | None:
    inner = _PARAMETRIZED.search(name)
    if inner is not None:  # weight_norm has a length 0 and a direction 1
        name = name[: inner.start()] + inner[1] + inner[2] + ("_g" if inner[3] == "0" else "")
    path, _, own = name.rpartition(".")
    owner, holder = modules[path], path.rpartition(".")[2]
    kinds = [cls.__name__ for cls in type(owner).__mro__ if cls not in (nn.Module, object)]
    is_map = isinstance(owner, _MAPS)
    named = own if is_map or own != "weight" else f"{holder}.{own}".removesuffix(".weight")
    if _BIAS.search(named):
        return "bias"
    if any(_NORM.search(kind) and not _MAP.search(kind) for kind in kinds) and not is_map:
        return "norm"
    if _TOKEN.search(own):
        return "token"
    is_table = not is_map and any(_TABLE.search(kind) for kind in kinds)
    if _POSITION.search(own) or (is_table and (_POSITION.search(holder) or any(map(_POSITIONAL.search, kinds)))):
        return "position embedding"
    is_weight = own.endswith("weight") or isinstance(owner, nn.RNNBase | nn.RNNCellBase)
    is_vector = parameter.dim() <= 1 or (sum(size > 1 for size in parameter.shape) <= 1 and not is_weight)
    return "scale" if is_vector else None
