"""Shadow parameters: where the statistic travels.

`track` gives every trained parameter a *shadow* of the same shape beside it, on the module that owns it. After a
backward pass the shadow's gradient is the sum of squared gradients; its value means nothing here. Since the shadow is
in `model.parameters()`, whatever moves gradients (accumulation, DDP, FSDP2, ZeRO) moves the statistic too. `state_dict`
and `load_state_dict` do not know of it.
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
    """Make every backward pass of `model` leave sum g^2 in the gradient of each parameter's shadow.

    Gradients stay the model's own, bit for bit. The squares are those of the gradients as they arrive: let a backward pass of a
    *mean* loss over B samples give ghat = (1/B) sum_b g_b. Then
        per="sample":       shadow.grad = sum_b (g_b / B)^2,
        per="micro_batch":  shadow.grad = sum_k (G_k / K)^2 over K micro-batches whose losses were divided by K,
    and `statistic_scale` turns either into a mean of squares. Gradients and squares accumulate over backward passes.

    With per="sample" a parameter that meets the batch in an operation without a rule, or after one that may have mixed its
    samples, is refused by name. Call the tracked model once for each backward pass. What a forward pass does to a parameter
    without any sample, and what the loss does to it outside of the model (a penalty on its norm), is no part of the statistic.

    Cast the model first (`model.bfloat16()` would cast the shadows too). Call it before wrapping the model (DDP, FSDP2,
    DeepSpeed) and before building the optimizer; and again, to take in what was added or unfrozen since. Parameters with
    requires_grad=False are left alone. torch.compile leaves a tracked model uncompiled.

    Args:
        model: any module; changed in place.
        per: "sample" for the squares of single samples' gradients; "micro_batch" for the square of the whole backward pass's
            gradient, which every module has and which costs next to nothing.
        batch_dim: dimension of the samples in the model's arguments.
        inputs: of a model that is called with several tensors, "first" for samples in the first, the others being the same
            for all samples, or "all" for samples in every one.
        samples: squares of so many samples of each forward pass, at even distances, each weighted for those it stands for;
            None for all. A sixteenth of the batch costs a fraction and is as good for an optimizer.
        fallback: names of modules to differentiate as a whole, sample by sample: for any whose samples do not interact.

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
    """Square these samples of the forward passes within, by their places in the batch, each counted `weight` times."""
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
    """Undo `track` on a model as it was given to it, not while DDP or another engine wraps it; return the model."""
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
    """Yield (name, parameter, shadow), a shared parameter once, under the name `named_parameters` gives it."""
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

    Engines that replace parameters (FSDP2, DeepSpeed) replace shadows too: ask again after wrapping.
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
    a sum over its units divided by n / W, and the average of the squares is W times too large.

    Args:
        num_units: n, over all ranks and accumulation steps.
        world_size: W; 1 for one process, or if gradients are summed over the ranks rather than averaged.
    """
    return num_units / world_size


def grad_sample_sq(model: nn.Module, batch_size: int, world_size: int = 1) -> dict[str, Tensor]:
    """Return {parameter name: (1/B) sum_b g_b^2} after the backward pass of a mean loss over B samples.

    Under per="micro_batch" give the number of micro-batches K in place of B; the result is (1/K) sum_k G_k^2.

    Args:
        model: tracked with `track`; under DDP, the wrapped module.
        batch_size: B, samples per update over all ranks and accumulation steps.
        world_size: W, ranks whose gradients the engine averaged.

    Returns:
        One tensor of the parameter's shape for each parameter that has a statistic.
    """
    scale = statistic_scale(batch_size, world_size)
    return {name: shadow.grad * scale for name, shadow in shadows(model).items() if shadow.grad is not None}
