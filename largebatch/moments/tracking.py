"""Shadow parameters, whose gradients carry the statistic.

`track` gives every trained parameter a *shadow* of the same shape beside it, on the module that owns it. After a
backward pass the shadow's gradient is the sum of squared gradients; the shadow's value is not used here. Since the shadow is
in `model.parameters()`, whatever accumulates or reduces gradients (DDP, FSDP2, ZeRO) does the same with the statistic.
`state_dict` and `load_state_dict` leave shadows out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from largebatch.errors import UserError, nearest
from largebatch.moments.interception import Intercepted, forward
from largebatch.moments.scope import Tracked, notes, state
from largebatch.moments.uses import statistic_dtype

SUFFIX = "_grad_sq"

ModelT = TypeVar("ModelT", bound=nn.Module)


def track(
    model: ModelT,
    per: Literal["sample", "micro_batch"] = "sample",
    *,
    batch_dim: int = 0,
    inputs: Literal["first", "all"] | None = None,
    samples: int | None = None,
    fallback: Iterable[str] = (),
) -> ModelT:
    """Make every backward pass of `model` add sum g^2 to the gradient of each parameter's shadow.

    The model's gradients stay the same, bit for bit. The squares are of gradients as the backward pass computes them: if the
    backward pass of a *mean* loss over B samples gives ghat = (1/B) sum_b g_b, then
        per="sample":       shadow.grad = sum_b (g_b / B)^2,
        per="micro_batch":  shadow.grad = sum_k (G_k / K)^2 over K micro-batches whose losses were divided by K,
    and `statistic_scale` turns either into a mean of squares. Gradients and squares accumulate over backward passes.

    With per="sample" an error names a parameter that is used in an operation through which samples cannot be followed, or after
    one that may have mixed them. Call the tracked model once for each backward pass. Terms of the loss that use a parameter
    without any sample, such as a penalty on its norm, are not squared.

    Cast the model first (`model.bfloat16()` would cast the shadows too). Call `track` before wrapping the model (DDP, FSDP2,
    DeepSpeed) and before building the optimizer; call it again after parameters were added or unfrozen. Parameters with
    requires_grad=False are not tracked. torch.compile leaves a tracked model uncompiled.

    Args:
        model: any module; changed in place.
        per: "sample" for the squares of single samples' gradients; "micro_batch" for the square of the whole backward pass's
            gradient, which works for every module and costs almost nothing.
        batch_dim: dimension of the samples in the model's arguments.
        inputs: for a model that is called with several tensors: "first" if only the first holds samples and the others are the
            same for all samples, "all" if each of them holds samples.
        samples: number of samples to square in each forward pass, evenly spaced and weighted to stand for all of them; None
            for all. A sixteenth of the batch costs a fraction of the time and is as good for an optimizer.
        fallback: names of modules to differentiate as a whole, sample by sample; their samples must not interact.

    Returns:
        `model`.

    Raises:
        UserError: for an unknown argument or module name.
    """
    if per not in ("sample", "micro_batch"):
        raise UserError(f"track: per must be 'sample' or 'micro_batch', got '{per}'")
    if inputs not in ("first", "all", None):
        raise UserError(f"track: inputs must be 'first' or 'all', got '{inputs}'")
    if samples is not None and samples < 1:
        raise UserError(f"track: samples must be at least 1, got {samples}")
    if isinstance(model, DistributedDataParallel):
        raise UserError(
            "track: the model is wrapped by DistributedDataParallel already, which would not reduce the squares; track it first"
        )
    modules = dict(model.named_modules())
    slow = set(fallback)
    for name in slow - set(modules):
        raise UserError(f"track: the model has no module '{name}'{nearest(name, modules)}")
    for name, parameter in model.named_parameters():
        if parameter.is_complex() and parameter.requires_grad:
            raise UserError(f"track: parameter '{name}' is complex; make it real and use torch.view_as_complex on it")
    for name, module in modules.items():
        is_lazy = any(isinstance(p, nn.parameter.UninitializedParameter) for p in module._parameters.values())
        if is_lazy or isinstance(module, torch.jit.ScriptModule):
            raise UserError(
                f"track: module '{name}' is scripted, or does not know its shapes yet; run it once, or leave it plain"
            )
    shadow_of: dict[int, nn.Parameter] = {}
    for _, parameter, shadow in list(_pairs(model)):
        if parameter.shape == shadow.shape and all(
            shadow is not other for other in shadow_of.values()
        ):  # or untied since
            shadow_of[id(parameter)] = shadow
    untrack(model)
    for path, module in modules.items():
        trained = {name: p for name, p in module._parameters.items() if p is not None and p.requires_grad}
        for name, parameter in trained.items():
            if id(parameter) not in shadow_of:
                zeros = torch.zeros_like(parameter, dtype=statistic_dtype(parameter.dtype))
                shadow_of[id(parameter)] = nn.Parameter(zeros)
                shadow_of[id(parameter)]._is_largebatch_shadow = True  # type: ignore[attr-defined]
            module.register_parameter(name + SUFFIX, shadow_of[id(parameter)])
        names = {name: name + SUFFIX for name in trained}
        module._largebatch = Tracked(names, path, [], per, batch_dim, inputs, samples, path in slow)
        if "forward" in module.__dict__:
            module.__dict__["_largebatch_forward"] = module.__dict__["forward"]
        module.__dict__["forward"] = Intercepted(forward, module)
        module.__dict__["_largebatch_handles"] = [
            module.register_state_dict_post_hook(_hide_shadows),
            module.register_load_state_dict_post_hook(_forget_missing_shadows),
        ]
    for module in modules.values():
        notes(module).owners = [m for m in module.modules() if notes(m).names]
    return model


@contextmanager
def chosen_samples(samples: list[int], weight: float) -> Iterator[None]:
    """Return a context in which forward passes square these samples, given by index, and weight each square by `weight`."""
    before, state.choice = state.choice, (samples, weight)
    try:
        yield
    finally:
        state.choice = before


def _hide_shadows(module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    for shadow_name in notes(module).names.values():
        state_dict.pop(prefix + shadow_name, None)


def _forget_missing_shadows(module: nn.Module, incompatible_keys: Any) -> None:
    own, missing = set(notes(module).names.values()), incompatible_keys.missing_keys
    missing[:] = [key for key in missing if key.rpartition(".")[2] not in own]


def untrack(model: ModelT) -> ModelT:
    """Undo `track` and return the model: the one that was given to `track`, not its wrapper by DDP or another engine."""
    for module in model.modules():
        if not hasattr(module, "_largebatch"):
            continue
        for shadow_name in notes(module).names.values():
            del module._parameters[shadow_name]
        del module.__dict__["forward"]
        if "_largebatch_forward" in module.__dict__:
            module.__dict__["forward"] = module.__dict__.pop("_largebatch_forward")
        for handle in module.__dict__.pop("_largebatch_handles"):
            handle.remove()
        del module._largebatch
    return model


def _pairs(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
    """Yield (name, parameter, shadow); a shared parameter comes once, under its name in `named_parameters`."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        tracked: Tracked | None = getattr(module, "_largebatch", None)
        for name, shadow_name in tracked.names.items() if tracked is not None else ():
            parameter, shadow = module._parameters.get(name), module._parameters[shadow_name]
            if parameter is None or shadow is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            shadow._is_largebatch_shadow = True
            yield f"{path}.{name}".lstrip("."), parameter, shadow


def shadows(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return {parameter name: shadow} of a tracked model.

    Engines that replace parameters (FSDP2, DeepSpeed) replace shadows too: call this function again after wrapping.
    """
    return {name: shadow for name, _, shadow in _pairs(model)}


def tracked_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the trained parameters of a tracked model and their shadows, in the order of `shadows`."""
    pairs = list(_pairs(model))
    return [parameter for _, parameter, _ in pairs], [shadow for _, _, shadow in pairs]


def is_shadow(parameter: Tensor) -> bool:
    """Whether a parameter is a shadow, as `track` made it or as `shadows` last returned it."""
    return getattr(parameter, "_is_largebatch_shadow", False)


def statistic_scale(num_units: int, world_size: int = 1) -> float:
    """Return the factor from a shadow's gradient to a mean of squares.

        (1/n) sum_u g_u^2 = (n / W) * shadow.grad

    where the gradients of n units (samples, or micro-batches under per="micro_batch") were each weighted 1/n in the
    global mean, and the engine averages gradients over W ranks (as DDP, FSDP2 and ZeRO do): each rank's loss is then
    the sum over its units divided by n / W, and shadow.grad is W times the sum of (g_u / n)^2.

    Args:
        num_units: n, over all ranks and accumulation steps.
        world_size: W; 1 for one process, or if gradients are summed over the ranks rather than averaged.
    """
    return num_units / world_size


def grad_sample_sq(model: nn.Module, batch_size: int, world_size: int = 1) -> dict[str, Tensor]:
    """Return {parameter name: (1/B) sum_b g_b^2} after the backward pass of a mean loss over B samples.

    Under per="micro_batch" pass the number of micro-batches K in place of B; the result is (1/K) sum_k G_k^2.

    Args:
        model: tracked with `track`; under DDP, the wrapped module.
        batch_size: B, number of samples per update over all ranks and accumulation steps.
        world_size: W, number of ranks over which the engine averaged gradients.

    Returns:
        One tensor of the parameter's shape for each parameter that has a statistic.
    """
    scale = statistic_scale(batch_size, world_size)
    return {name: shadow.grad * scale for name, shadow in shadows(model).items() if shadow.grad is not None}
