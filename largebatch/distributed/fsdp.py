"""Sharded data parallelism with FSDP2: each rank keeps its shard of every parameter, gradient and optimizer state.

A module's parameters are gathered for its forward and for its backward pass, and its gradients are reduce-scattered.
Shadows are sharded like their parameters, so the optimizer has shards of the weight, its gradient and its squares with the
same layout. As on every engine, weights stay float32 and autocast provides lower precision; `gathering` describes the data
types of the all-gathers. Gradients and squares are reduced in float32.
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
    """The `Backend` for sharded parameters, gradients and optimizer state.

    Args:
        ranks: this process's rank and the world size.
        device: device of this process.
        precision: ``fp32``, ``fp64``, or autocast to ``bf16`` or ``fp16`` (the latter with loss scaling).
        compile_model: compile each module whose parameters are gathered together with torch.compile.
        shard: names (with wildcards) or classes of the modules whose parameters are gathered together; None: `blocks`.
        offload: keep parameters, gradients and optimizer state in CPU memory.
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
        """Move the model to the device and shard it in place; return the module to call, and the optimizer of its shards.

        Raises:
            UserError: if FSDP2 cannot shard a parameter, if `chosen` raises, or if squares are tracked in a compiled model.
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
            module.forward = torch.compile(module.forward)  # does not include the hooks that gather
        for module in [*modules, model]:
            fully_shard(module, mesh=mesh, offload_policy=policy)
        if not self.offload:  # with offloading, FSDP2 copies a shard to the device, and the copy lacks the functions
            for shadow in shadows(model).values():  # the sharded shadows, which are new objects
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
        """Run one micro-batch; each rank accumulates unsharded gradients until the micro-batch with ``sync`` reduces them."""
        self.wrapper.set_requires_gradient_sync(sync)
        with self.noting_use(sync, idle):
            yield

    def largest_gradient(self, parameter: nn.Parameter) -> float | None:
        """Return the largest absolute element of a parameter's or shadow's gradient over all ranks; None without a gradient."""
        if parameter.grad is None:
            return None
        own = self.local(parameter.grad)
        found = torch.zeros(self.world_size, device=own.device)
        if own.numel():
            found[self.rank] = own.abs().max()
        return float(self.sum(found).max())

    def local(self, gradient: Tensor) -> Tensor:
        """Return this rank's shard of a gradient; it shares the gradient's memory."""
        assert isinstance(gradient, DTensor)
        with torch.no_grad():
            return gradient.to_local()

    def over_ranks(self, sums: Tensor) -> Tensor:
        """Return sums over the whole model, given the sums over each rank's shards."""
        return self.sum(sums)

    def gradient_norm(self, grads: list[Tensor]) -> Tensor:
        """Return the Euclidean norm over the shards of all ranks."""
        # Square in float64, so that the square of a finite float32 norm does not overflow.
        return self.sum(super().gradient_norm(grads).double().square()).sqrt()


def _reduce_unused(module: nn.Module) -> None:
    """Let a module reduce zeros for its parameters without a gradient on this rank, because other ranks may have one."""
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
    """Watch the unsharded parameters that a module gathers: they exist from its first pass on, and remain the same objects."""
    prefix = f"{path}." if path else ""

    def watch(*_: object) -> None:
        whole = ((prefix + name, p) for name, p in module.named_parameters() if not isinstance(p, DTensor))
        usage.watch((name, p) for name, p in whole if p.requires_grad)
        handle.remove()

    handle = module.register_forward_pre_hook(watch)


def _cut_after_evaluation(model: nn.Module, *_: object) -> None:
    """Reshard the outermost parameters, which FSDP2 keeps unsharded for a backward pass; evaluation has none."""
    if not torch.is_grad_enabled():
        assert isinstance(model, FSDPModule)
        model.reshard()


def factors(model: nn.Module) -> list[nn.Parameter]:
    """Return the weights that only linear layers and convolutions use; autocast rounds them before the multiplication."""
    only: dict[nn.Parameter, bool] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            is_factor = name == "weight" and isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
            only[parameter] = only.get(parameter, True) and is_factor
    return [parameter for parameter, is_factor in only.items() if is_factor]


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the elements of the model's nn.ModuleList and nn.Sequential containers that have parameters, none of them shared.

    An nn.ModuleList or plain nn.Sequential inside another one is searched too; other elements are not.
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
    """Return the modules whose name or class matches one of the patterns, inner modules before those that contain them.

    Raises:
        UserError: if a pattern matches no module, or if a module has a parameter that is also used outside it.
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
    """Return a function from a module to the name of one of its parameters that is also used outside it, or None."""
    times = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))

    def shared(module: nn.Module) -> str | None:
        inside = list(module.named_parameters(remove_duplicate=False))
        times_inside = Counter(id(p) for _, p in inside)
        return next((name for name, p in inside if times_inside[id(p)] < times[id(p)]), None)

    return shared
