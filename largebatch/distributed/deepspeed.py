"""DeepSpeed with ZeRO stages 0 to 3: optimizer state (1), gradients (2) and weights (3) are partitioned over the ranks.

Shadows are ordinary parameters, so ZeRO partitions and reduces the squares as it does the gradients. As on every engine,
weights stay float32 and autocast provides lower precision: squares of bfloat16 gradients are added in float32.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from largebatch.distributed.backend import NonFiniteError, Precision, Ranks
from largebatch.distributed.engine import Engine
from largebatch.distributed.partitions import PARAMETER, Partitions, SteppedByGroup
from largebatch.distributed.presence import check_statistics
from largebatch.distributed.route import ADVICE
from largebatch.distributed.state import MODEL, OPTIMIZER, check_names, read_into, read_tensors, tensor_metadata
from largebatch.distributed.usage import Used
from largebatch.errors import SharedError, UserError
from largebatch.moments import is_shadow
from largebatch.optim import LAMB, LARS, scale_gradients


class DeepSpeed(Engine):
    """The `Backend` for DeepSpeed.

    Args:
        ranks: this process's rank and the world size.
        device: device of this process.
        precision: ``fp32``, or autocast to ``bf16`` or ``fp16`` over float32 weights.
        config: DeepSpeed's configuration (`load_ds_config`).

    Raises:
        UserError: if DeepSpeed is not installed.
    """

    needs_group_alone: ClassVar[bool] = True

    def __init__(self, ranks: Ranks, device: torch.device, precision: Precision, config: dict[str, Any]) -> None:
        self.deepspeed = require_deepspeed(device)
        super().__init__(ranks, device, precision)
        self.config = config
        zero = config["zero_optimization"]
        self.stage = int(zero["stage"])
        self.offloads = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
        self.name = f"DeepSpeed ZeRO-{self.stage}"
        self.local_rank = ranks.local_rank
        self.good_updates = 0

    def prepare(
        self, model: nn.Module, build_optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Move the model to the device and partition it; return the module to call, and its optimizer."""
        self.place(model)
        optimizer = build_optimizer(model)
        groups = [dict(group) for group in optimizer.param_groups]
        if self.stage > 0 and isinstance(optimizer, (LARS, LAMB)):
            raise UserError(
                f"optimizer.name: {type(optimizer).__name__.lower()} needs whole layers, which ZeRO-{self.stage} cuts up; "
                "use --backend.zero_stage 0, or --backend.name ddp or fsdp"
            )
        self.note_use(model)
        if self.stage > 0 and self.world_size > 1:
            owners = [(name, m) for name, m in model.named_modules() if any(True for _ in m.parameters(recurse=False))]
            self.compare_routes(owners)
        self.client = SteppedByGroup(optimizer) if self.stage > 0 else None
        os.environ["LOCAL_RANK"] = str(self.local_rank)  # from which DeepSpeed takes its device
        with _nothing_compiled():
            self.deepspeed.init_distributed(dist_init_required=False, verbose=False)
        self.wrapper, *_ = self.deepspeed.initialize(
            model=model, optimizer=self.client or optimizer, config=self.config, dist_init_required=False
        )
        self.partitions = Partitions(self.wrapper, optimizer, groups)
        if self.client is not None:
            self.client.partitions = self.partitions
        named = [(name, parameter) for name, parameter in model.named_parameters() if not is_shadow(parameter)]
        self.names = {parameter: name for name, parameter in named if parameter in self.partitions.shapes}
        self.frozen = {name: parameter for name, parameter in named if parameter not in self.partitions.shapes}
        self.by_size: dict[int, list[nn.Parameter]] = {}
        for _, parameter in named if self.stage == 3 else ():
            self.by_size.setdefault(parameter.ds_numel, []).append(parameter)  # type: ignore[attr-defined]
        return self.wrapper, optimizer

    @contextmanager
    def accumulate(self, sync: bool, idle: bool = False) -> Iterator[None]:
        """Run one micro-batch, and tell DeepSpeed whether it is the last one of the update."""
        self.wrapper.set_gradient_accumulation_boundary(sync)
        saved = nullcontext() if self.stage < 3 else saved_tensors_hooks(self._save, _restore)
        with self.noting_use(sync, idle), saved:
            yield

    def leave_alone(self, found: Used) -> None:
        """Remove the gradients of parameters that no pass of the update used, and those of their shadows.

        Raises:
            SharedError: if the ranks have reduced gradients of different parameters, or if ZeRO has lost a gradient.
        """
        if self.client is None:
            super().leave_alone(found)
        elif found.parted:
            raise SharedError(
                f"model: in one update some ranks used parameter '{found.parted[0]}' and others did not, which {self.name} "
                f"cannot do: {ADVICE}"
            )
        elif found.early and self.offloads:  # ZeRO then keeps only gradients that the last pass reaches
            raise SharedError(
                f"model: the last micro-batch of an update did not use parameter '{found.early[0]}', which one before it did: "
                f"{self.name} with offload_optimizer loses its gradient; do not offload, or use --backend.name ddp or fsdp"
            )
        else:
            self.client.unused = {parameter for name in found.unused for parameter in self.named_gradients[name]}

    def _save(self, tensor: Tensor) -> Tensor | tuple[nn.Parameter, torch.Size, tuple[int, ...]]:
        """Replace a weight that autograd saves for the backward pass by a reference to its parameter.

        The saved tensor is a view of the gathered weight (`F.linear` transposes it) and would keep the whole weight in memory
        until the backward pass. DeepSpeed's own linear function avoids this too, but the tracking cannot intercept it.
        """
        for parameter in self.by_size.get(tensor.numel(), ()):
            if parameter.data_ptr() == tensor.data_ptr() and parameter.dtype == tensor.dtype:
                return parameter, tensor.shape, tensor.stride()
        return tensor

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of this rank's share of the batch's mean loss."""
        self.losses_finite &= loss.detach().isfinite()
        self.agree_on_route()
        self.wrapper.backward(self.scaler.scale(loss * self.world_size), scale_wrt_gas=False)

    def step(self, optimizer: torch.optim.Optimizer, max_grad_norm: float | None = None) -> float:
        """Clip the gradients, update the parameters and clear the gradients; return the global gradient norm before clipping.

        Raises:
            NonFiniteError: on every rank, if the norm is not finite; nothing is updated.
        """
        parts = list(zip(self.partitions.gradients(), self.partitions.of_shadows, strict=True))
        grads = [tensor for part, of_shadows in parts if not of_shadows for tensor in part]
        squares = [tensor for part, of_shadows in parts if of_shadows for tensor in part]
        scale = self.scaler.get_scale()
        scale_gradients(grads, squares, self.factor)
        norm = float(self.gradient_norm(grads))
        finite = norm - norm == 0.0
        if finite and max_grad_norm is not None:
            scale_gradients(grads, squares, min(1.0, max_grad_norm / (norm + 1e-6)))
        applied = self._apply(finite)
        if not applied:
            self.check_losses(self.client or optimizer)
            if self.precision != "fp16":
                raise NonFiniteError([])  # the gradient is finite, but its squares are not
        if self.scaler.is_enabled():
            self._adapt_scale(scale, applied)
        self.losses_finite.fill_(True)
        self.partitions.clear_gradients()
        return norm

    def local_sums(self, parameters: list[nn.Parameter], shadows: list[nn.Parameter]) -> Tensor:
        """Return `largebatch.noise.estimator.partial_sums` of this rank's partitions."""
        return self.partitions.power_sums(parameters, shadows)

    def over_ranks(self, sums: Tensor) -> Tensor:
        """Return sums over the whole model, given the sums over each rank's partitions."""
        return super().over_ranks(sums) if self.stage == 0 else self.sum(sums)

    def gradient_norm(self, grads: list[Tensor]) -> Tensor:
        """Return the Euclidean norm over all gradients of the model, from the parts on each rank."""
        squared = torch.stack(torch._foreach_norm(grads)).square().sum().to(self.device)
        return (squared if self.stage == 0 else self.sum(squared)).sqrt()

    def _apply(self, finite: bool) -> bool:
        """Update the parameters, or drop the gradients; return whether the update was made.

        ZeRO itself drops the gradients if any element of a gradient or of the squares is not finite.
        """
        if self.client is not None:
            self.client.begin()
        elif not finite:
            self.wrapper.zero_grad()
            return False
        self.wrapper.step()
        return bool(self.wrapper.was_step_applied())

    def _adapt_scale(self, scale: float, applied: bool) -> None:
        """Lower the loss scale of fp16 after an overflow, and raise it after many updates, by the rule of GradScaler."""
        self.good_updates = self.good_updates + 1 if applied else 0
        if not applied:
            scale *= self.scaler.get_backoff_factor()
        elif self.good_updates == self.scaler.get_growth_interval():
            scale, self.good_updates = scale * self.scaler.get_growth_factor(), 0
        self.scaler.update(scale)

    def check_statistics(self, model: nn.Module, num_units: float = 1.0, names: list[str] | None = None) -> list[str]:
        """Raise if a parameter has a gradient but no squares; return those whose gradient was too small to decide.

        If the same model passes on a single process, an option of DeepSpeed has replaced the operation.
        """
        found = self.partitions.largest_gradients()
        return check_statistics(model, num_units, names, lambda parameter: found.get(parameter, 0.0))

    def full_state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Yield each trained parameter's name and its whole tensors in CPU memory; a collective.

        The tensors are {"parameter": float32 master weight, "exp_avg_sq": ..., and further slots of the optimizer's state}.
        """
        slots = self.partitions.slots()
        for parameter, name in self.names.items():
            yield name, self.partitions.full(parameter, slots[parameter])

    def load_full_state(self, state: Iterable[tuple[str, dict[str, Tensor]]]) -> None:
        """Load the tensors that `full_state` yielded, on any stage and any number of ranks."""
        parameters = {name: parameter for parameter, name in self.names.items()}
        self.partitions.optimizer.state.clear()  # including parameters that had no state yet in the checkpoint
        for name, full in state:
            self.partitions.load(parameters[name], full)
        self.partitions.refresh()

    def state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """Return the tensors for a checkpoint by name; each rank returns the whole tensors of some of the parameters."""
        names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        state = {MODEL + name: value.detach() for name, value in model.state_dict().items() if name not in names}
        aliases = self._aliases(model)
        for number, (name, full) in enumerate(self.full_state()):
            if number % self.world_size != self.rank:
                continue
            weight = full.pop(PARAMETER)
            state.update({MODEL + alias: weight for alias in aliases[name]})
            state.update({f"{OPTIMIZER}{name}.{slot}": tensor for slot, tensor in full.items()})
        for name, parameter in self.frozen.items():
            with self._whole(parameter):
                state.update({MODEL + alias: parameter.detach().cpu().clone() for alias in aliases[name]})
        return state | self.scaler_state()

    def scaler_state(self) -> dict[str, Tensor]:
        """Return the state of fp16's loss scaling by name; this engine counts the updates since the last change itself."""
        state = super().scaler_state()
        return state | {name: torch.tensor(self.good_updates) for name in state if name.endswith("growth_tracker")}

    def load_state(self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Load the tensors that `state` returned, from a checkpoint of any engine and number of ranks, parameter by parameter.

        Raises:
            UserError: if the checkpoint is of another model; nothing is changed then.
        """
        check_names(path, _Described(model))
        saved = tensor_metadata(path)
        buffers = {MODEL + name: buffer for name, buffer in model.named_buffers() if MODEL + name in saved}
        read_into(path, {name: buffer.detach() for name, buffer in buffers.items()})

        def read() -> Iterator[tuple[str, dict[str, Tensor]]]:
            for name in self.names.values():
                prefix = f"{OPTIMIZER}{name}."
                slots = {
                    n: n.removeprefix(prefix) for n in saved if n.startswith(prefix) and "." not in n[len(prefix) :]
                }
                keys = slots | {MODEL + name: PARAMETER}
                yield name, {keys[key]: tensor for key, tensor in read_tensors(path, keys).items()}

        self.load_full_state(read())
        self.load_scaler_state(path)
        self.good_updates = self.scaler.state_dict().get("_growth_tracker", 0)
        for name, parameter in self.frozen.items():
            with self._whole(parameter, modifier_rank=0), torch.no_grad():
                parameter.copy_(read_tensors(path, [MODEL + name])[MODEL + name])

    def _aliases(self, model: nn.Module) -> dict[str, list[str]]:
        """Return, for each parameter's first name, all of its names in the model's state_dict."""
        first = {parameter: name for name, parameter in model.named_parameters()}
        aliases: dict[str, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            aliases.setdefault(first[parameter], []).append(name)
        return aliases

    def _whole(self, parameter: nn.Parameter, modifier_rank: int | None = None) -> AbstractContextManager[Any]:
        """Return a context manager in which a parameter that ZeRO-3 partitions is gathered."""
        if self.stage < 3:
            return nullcontext()
        return self.deepspeed.zero.GatheredParameters([parameter], modifier_rank=modifier_rank)

    def close(self) -> None:
        """Remove DeepSpeed's hooks and groups, and leave the process group."""
        if self.wrapper is not None:
            self.wrapper.destroy()
        self.client = None
        self.__dict__.pop("partitions", None)
        # DeepSpeed keeps its copy of the world group, which a later engine of this process would otherwise use.
        self.deepspeed.utils.groups._release_process_group_references()
        super().close()


class _Described(nn.Module):
    """A model's names and shapes; parameters that ZeRO-3 partitions have the shapes of the whole parameters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.whole = {
            name: torch.empty(getattr(p, "ds_shape", p.shape), device="meta")
            for name, p in model.named_parameters(remove_duplicate=False)
        }
        self.given = model.state_dict()

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """Return tensors of which only the shapes are meaningful."""
        return {name: self.whole.get(name, value) for name, value in self.given.items()}


def _restore(saved: Tensor | tuple[nn.Parameter, torch.Size, tuple[int, ...]]) -> Tensor:
    """Return the tensor that `_save` replaced; ZeRO-3 has gathered a module's weights before its backward pass."""
    if isinstance(saved, Tensor):
        return saved
    parameter, size, stride = saved
    whole = parameter.data
    if whole.numel() == 0:
        raise RuntimeError(f"ZeRO-3 has not gathered a weight of {size.numel()} elements for the backward pass")
    return whole.as_strided(size, stride, whole.storage_offset())


@contextmanager
def _nothing_compiled() -> Iterator[None]:
    """Keep DeepSpeed from compiling its shared-memory all-reduce, which is only used for inference on CPUs.

    The first process to start would compile for minutes while the others wait. If it were killed meanwhile, it would leave a
    lock for which every later process waits forever.
    """
    transport: Any = import_module("deepspeed.comm.torch")  # deepspeed.comm's attribute of that name is PyTorch
    build = transport.build_shm_op
    transport.build_shm_op = lambda: None
    try:
        yield
    finally:
        transport.build_shm_op = build


def require_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed, and silence its warnings.

    Raises:
        UserError: if it is not installed, with the command that installs it.
    """
    if find_spec("deepspeed") is None:
        raise UserError("backend.name: DeepSpeed is not installed; pip install 'largebatch[deepspeed]'")
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    import deepspeed

    # It warns of every optimizer except its own, and uses names that torch has deprecated.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "`torch.distributed.*deprecated", FutureWarning)
    return deepspeed
