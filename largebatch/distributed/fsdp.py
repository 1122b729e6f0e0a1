"""Sharded data parallelism by FSDP2: each rank keeps its part of every parameter, gradient and optimizer state.

A module's parameters are gathered for its forward and for its backward pass, and its gradients are reduced to the rank
that keeps the part. Shadows are cut as their parameters are, so the optimizer meets a part of the weight, of its gradient
and of its squares that lie alike. Weights stay float32; lower precision is autocast's, as on every engine, and what
travels is told in `gathering`. Gradients and squares travel in float32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from largebatch.distributed.backend import Precision, Ranks
from largebatch.distributed.engine import Engine
from largebatch.distributed.gathering import gather_in, gather_nothing
from largebatch.distributed.usage import Usage
from largebatch.errors import UserError, nearest
from largebatch.moments import shadows

ROUTE_ADVICE = (
    "every rank has to gather the same modules in each pass; name modules in backend.shard that all of them run, around those "
    "that differ, or use --backend.name ddp"
)


class FullyShard(Engine):
    """The `Backend` for shards of everything.

    Args:
        ranks: this process among all.
        device: its device.
        precision: ``fp32``, ``fp64``, or autocast to ``bf16`` or ``fp16`` (the latter with loss scaling).
        compile_model: compile what is gathered as one with torch.compile, module by module.
        shard: names or classes of the modules gathered as one, with wildcards; None: `blocks`.
        offload: keep parameters, gradients and optimizer state in the memory of the CPU.
    """

    name = "FSDP2"
    needs_group_alone = True

    def __init__(
        self,
        ranks: Ranks,
        device: torch.device,
        precision: Precision = "fp32",
        compile_model: bool = False,
        shard: list[str] | None = None,
        offload: bool = False,
    ) -> None:
        super().__init__(ranks, device, precision)
        self.compile_model, self.shard, self.offload = compile_model, shard, offload

    def prepare(
        self, model: nn.Module, build_optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Move the model to the device and cut it, in place; return what to call, and the optimizer of its parts.

        Raises:
            UserError: for a parameter that FSDP2 cannot cut, and for what `chosen` refuses.
        """
        self.place(model)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 0 or not parameter.is_contiguous():
                what = "has no dimension" if parameter.ndim == 0 else "is not contiguous in memory"
                raise UserError(
                    f"backend.name: fsdp cuts parameters along their first dimension, '{name}' {what}; use --backend.name ddp"
                )
        modules = blocks(model) if self.shard is None else chosen(model, self.shard)
        mesh = init_device_mesh(self.device.type, (self.world_size,))
        policy = CPUOffloadPolicy() if self.offload else OffloadPolicy()
        if self.compile_model and shadows(model):
            raise UserError(
                "backend.compile: with tracked squares the compiler starts anew at every gathering of fsdp; "
                "use --backend.name ddp, or track none (optimizer.second_moment batch, noise.measure false)"
            )
        for module in (modules or [model]) if self.compile_model else ():
            module.forward = torch.compile(module.forward)  # without the hooks that gather
        for module in [*modules, model]:
            fully_shard(module, mesh=mesh, offload_policy=policy)
        if not self.offload:  # FSDP2 copies a part to the device before it looks for what is said on it
            for shadow in shadows(model).values():  # the cut ones, which are other objects
                gather_nothing(shadow)
            if self.half is not None:
                for weight in factors(model):
                    gather_in(weight, self.half)
        model.register_forward_hook(_cut_after_evaluation)
        self.wrapper = model
        usage = self.note_use(model, watch=False)
        gathered = [(name, module) for name, module in model.named_modules() if module in {model, *modules}]
        for name, module in gathered:
            _watch_gathered(name, module, usage)
            _reduce_unused(module)
        if self.world_size > 1:
            self.compare_routes([(name or "(the rest)", module) for name, module in gathered], ROUTE_ADVICE)
        return model, build_optimizer(model)

    @contextmanager
    def accumulate(self, sync: bool, idle: bool = False) -> Iterator[None]:
        """Run one micro-batch; whole gradients add up on each rank until the one with ``sync`` reduces them."""
        self.wrapper.set_requires_gradient_sync(sync)
        with self.noting_use(sync, idle):
            yield

    def largest_gradient(self, parameter: nn.Parameter) -> float | None:
        """Return the largest absolute element of a gradient, or of a sum of squares, over all ranks; None without one."""
        if parameter.grad is None:
            return None
        own = self.local(parameter.grad)
        found = torch.zeros(self.world_size, device=own.device)
        if own.numel():
            found[self.rank] = own.abs().max()
        return float(self.sum(found).max())

    def local(self, gradient: Tensor) -> Tensor:
        """Return this rank's part of a gradient, sharing its memory."""
        assert isinstance(gradient, DTensor)
        with torch.no_grad():
            return gradient.to_local()

    def over_ranks(self, sums: Tensor) -> Tensor:
        """Return sums over the whole model from those of each rank's parts."""
        return self.sum(sums)

    def gradient_norm(self, grads: list[Tensor]) -> Tensor:
        """Return the Euclidean norm over the parts of all ranks."""
        # Squared in float64, where a norm that float32 can hold does not overflow.
        return self.sum(super().gradient_norm(grads).double().square()).sqrt()


def _reduce_unused(module: nn.Module) -> None:
    """Let a module reduce zeros for the parameters of its own that have no gradient on this rank: others may have one."""
    assert isinstance(module, FSDPModule)
    if hasattr(module, "set_reduce_scatter_unused_params"):  # since torch 2.13
        module.set_reduce_scatter_unused_params(True, recurse=False)
        return
    group: Any = module._get_fsdp_state()._fsdp_param_group
    if group is None:
        return
    reduce = group.post_backward

    def fill_up_and_reduce(*arguments: Any) -> None:
        for p in group.fsdp_params if group.reduce_grads else ():
            whole = getattr(p, "_unsharded_param", None)
            if (
                whole is not None
                and whole.requires_grad
                and whole.grad is None
                and p.unsharded_accumulated_grad is None
            ):
                p.unsharded_accumulated_grad = torch.zeros(whole.shape, dtype=whole.dtype, device=whole.device)
        reduce(*arguments)

    group.post_backward = fill_up_and_reduce


def _watch_gathered(path: str, module: nn.Module, usage: Usage) -> None:
    """Watch the whole parameters that a module gathers: they are there in its first pass, and stay the same ones."""
    prefix = f"{path}." if path else ""

    def watch(*_: object) -> None:
        whole = ((prefix + name, p) for name, p in module.named_parameters() if not isinstance(p, DTensor))
        usage.watch((name, p) for name, p in whole if p.requires_grad)
        handle.remove()

    handle = module.register_forward_pre_hook(watch)


def _cut_after_evaluation(model: nn.Module, *_: object) -> None:
    """Cut the outermost parameters again, which FSDP2 keeps whole for a backward pass that evaluation does not have."""
    if not torch.is_grad_enabled():
        assert isinstance(model, FSDPModule)
        model.reshard()


def factors(model: nn.Module) -> list[nn.Parameter]:
    """Return the weights that linear layers and convolutions alone use: autocast rounds them before it multiplies."""
    only: dict[nn.Parameter, bool] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            is_factor = name == "weight" and isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
            only[parameter] = only.get(parameter, True) and is_factor
    return [parameter for parameter, is_factor in only.items() if is_factor]


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the elements of the model's lists and sequences that have parameters, but for what they share with others.

    A list or a plain nn.Sequential within another is looked into, a block is not.
    """
    shared = _parameters_elsewhere(model)
    found: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        for child in module.children():
            if not isinstance(module, nn.ModuleList | nn.Sequential) or _is_container(child):
                visit(child)
            elif any(True for _ in child.parameters()) and not shared(child) and child not in found:
                found.append(child)

    visit(model)
    return found


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList) or type(module) is nn.Sequential


def chosen(model: nn.Module, patterns: list[str]) -> list[nn.Module]:
    """Return the modules whose name or class fits one of some patterns, inner ones before those around them.

    Raises:
        UserError: if a pattern fits nothing, or a module holds a parameter that is used outside it too.
    """
    named = {name: module for name, module in model.named_modules() if name}
    shared = _parameters_elsewhere(model)
    found: dict[str, nn.Module] = {}
    for pattern in patterns:
        fitting = [
            name for name, module in named.items() if fnmatchcase(name, pattern) or type(module).__name__ == pattern
        ]
        if not fitting:
            known = {*named, *(type(module).__name__ for module in named.values())}
            raise UserError(f"backend.shard: the model has no module or class '{pattern}'{nearest(pattern, known)}")
        found |= {name: named[name] for name in fitting if any(True for _ in named[name].parameters())}
    for name, module in found.items():
        if common := shared(module):
            raise UserError(
                f"backend.shard: module '{name}' shares parameter '{common}' with another; name a module around both"
            )
    return [found[name] for name in reversed([name for name in named if name in found])]


def _parameters_elsewhere(model: nn.Module) -> Callable[[nn.Module], str | None]:
    """Return a function from a module to the name of a parameter in it that the model has outside it too, or None."""
    times = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))

    def shared(module: nn.Module) -> str | None:
        inside = list(module.named_parameters(remove_duplicate=False))
        times_inside = Counter(id(p) for _, p in inside)
        return next((name for name, p in inside if times_inside[id(p)] < times[id(p)]), None)

    return shared
