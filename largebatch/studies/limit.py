"""``largebatch limit CONFIG``: the largest batch size with stable steps, at the beginning or at checkpoints of a run.

lambda is the largest eigenvalue of D^-1/2 H D^-1/2, where H is the Hessian of the training loss and D holds the values by
which the optimizer divides gradients in its next update. It is measured on the samples that the run would use next, split into
`UNITS` units. The Lanczos method on every second unit gives a value that is too large on average, because it also fits the
noise of these samples. The curvature of the other units along the eigenvector that it finds is too small on average. lambda
lies between the two.

Every rank holds the whole model as a plain module, read from a checkpoint of any engine, and has its share of the units.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from largebatch.checkpoint.folder import CheckpointFolder, find_problems, read_run_state, samples_of
from largebatch.checkpoint.manager import Checkpoint
from largebatch.config.schema import Config
from largebatch.data import Source
from largebatch.data.sampler import global_batch
from largebatch.data.source import readable
from largebatch.distributed import Backend, Ranks, create_backend, launched_ranks
from largebatch.distributed.backend import BackendConfig
from largebatch.distributed.state import load_group_state, load_named_state
from largebatch.distributed.watch import cause_of
from largebatch.errors import UserError
from largebatch.models import batch_norms, discard_batch_statistics, norm_group_size
from largebatch.noise.curvature import hessian_product, largest_eigenvalue, noise_of_units
from largebatch.noise.estimator import Noise
from largebatch.noise.limit import stability_share
from largebatch.optim import param_groups, set_hyperparameters
from largebatch.optim.adaptive import AdaptiveOptimizer
from largebatch.optim.averages import Moment
from largebatch.optim.response import KNOWN, denominators, gain_of, lookahead_of, momentum_of
from largebatch.planner.resolve import resolve
from largebatch.planner.run import Run
from largebatch.planner.show import print_warnings
from largebatch.reporting.limits import Place, describe_limit, limit_table
from largebatch.section import user_path
from largebatch.task import Task
from largebatch.training.resume import check_same_run
from largebatch.training.run import build_model
from largebatch.training.run_folder import CHECKPOINTS

# Number of units of samples. Every second unit is used to find the eigenvector, and all of them to measure the noise.
UNITS = 32
LARGEST_PASS = 64  # maximum number of samples in a forward pass if the config has no micro_size


class LossSurface:
    """The training loss on some samples around the weights of a model, with its gradients and its curvature.

    Args:
        model: the model, on the backend's device. It is set to training mode, and each unit always gets the same dropout.
        params: the parameters, in the order of vectors of shape (P,).
        task: computes the samples' losses.
        backend: the backend whose ranks share the units.
        units: the units of this rank, {number: (inputs, targets)}.
        pass_size: maximum number of samples in a forward pass.
        seed: seed of the dropout.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Sequence[nn.Parameter],
        task: Task,
        backend: Backend,
        units: dict[int, tuple[Tensor, Tensor]],
        pass_size: int,
        seed: int,
    ) -> None:
        self.model, self.params, self.task, self.backend, self.units = model.train(), params, task, backend, units
        self.pass_size, self.seed, self.norms = pass_size, seed, batch_norms(model)
        counts = torch.zeros(UNITS, dtype=torch.float64)
        for number, (_, targets) in units.items():
            counts[number] = task.known(targets).sum()
        self.counts = backend.sum(counts).cpu()
        if not bool((self.counts > 0).all()):
            raise UserError("--samples: a unit of them has no sample with a target that can be read; measure on more")

    def _losses(self, number: int) -> Iterator[Tensor]:
        """Yield the sum of the losses of each forward pass over a unit."""
        inputs, targets = self.units[number]
        on_gpu = [self.backend.device] if self.backend.device.type == "cuda" else []
        # The fused kernels of attention and of recurrent layers do not support second derivatives.
        with torch.random.fork_rng(on_gpu), sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
            torch.manual_seed(self.seed + number)
            for part in zip(inputs.split(self.pass_size), targets.split(self.pass_size), strict=True):
                yield self.task.losses(self.model(part[0]), part[1]).sum()
                discard_batch_statistics(self.norms)

    def gradient(self, number: int) -> Tensor:
        """Return the gradient of a unit's mean loss, (P,)."""
        total = torch.zeros(sum(p.numel() for p in self.params), device=self.backend.device, dtype=self.backend.dtype)
        for loss in self._losses(number):
            grads = torch.autograd.grad(loss, self.params, allow_unused=True, materialize_grads=True)
            total += self._flat(grads)
        return total / self.counts[number].item()

    def product(self, vector: Tensor, numbers: range) -> Tensor:
        """Return H v, (P,), for the mean loss over the given units; the same on every rank. This is a collective."""
        parts = [
            part.view_as(p) for part, p in zip(vector.split([p.numel() for p in self.params]), self.params, strict=True)
        ]
        total = torch.zeros_like(vector)
        with torch.enable_grad():
            for number in self.units.keys() & set(numbers):
                for loss in self._losses(number):
                    total += self._flat(hessian_product(loss, self.params, parts))
        return self.backend.sum(total) / self.counts[list(numbers)].sum().item()

    @staticmethod
    def _flat(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])

    def noise(self) -> tuple[Noise, Tensor, Tensor]:
        """Return the noise scale, the mean gradient, and each element's variance sigma^2 over samples. This is a collective."""
        size = float(self.counts.mean())
        sums = torch.zeros(2, sum(p.numel() for p in self.params), device=self.backend.device, dtype=self.backend.dtype)
        known = torch.zeros(2, UNITS, dtype=torch.float64, device=self.backend.device)
        for number in self.units:
            gradient = self.gradient(number)
            sums[0] += gradient
            sums[1].addcmul_(gradient, gradient)
            known[0, number] = gradient.square().sum(dtype=torch.float64)
        sums = self.backend.sum(sums)
        for number in self.units:
            known[1, number] = (self.gradient(number) * sums[0]).sum(dtype=torch.float64)
        known = self.backend.sum(known)
        mean = sums[0] / UNITS
        variance = (sums[1] / UNITS - mean.square()).clamp_(min=0.0).mul_(size * UNITS / (UNITS - 1.0))
        return noise_of_units(known[0], known[1], size), mean, variance

    def eigenvalue(self, scale: Tensor) -> tuple[float, float]:
        """Return a lower and an upper bound of the largest eigenvalue of S H S, with H of the whole training loss.

        Args:
            scale: the diagonal of S, (P,).
        """
        found, others = range(0, UNITS, 2), range(1, UNITS, 2)
        generator = torch.Generator().manual_seed(self.seed)
        start = torch.randn(len(scale), generator=generator, dtype=torch.float64).to(scale) * (scale > 0)
        pair = largest_eigenvalue(lambda v: scale * self.product(scale * v, found), start)
        scaled = scale * pair.vector
        elsewhere = float((scaled * self.product(scaled, others)).sum(dtype=torch.float64))
        return min(elsewhere, pair.value), pair.value + pair.residual


def _units(run: Run, source: Source, backend: Backend, samples_seen: int, num_samples: int) -> dict[int, Any]:
    """Return this rank's units of the samples that the run would use next, on its device."""
    keys = global_batch(run.config.seed, len(source.train), samples_seen, num_samples)
    size, found = num_samples // UNITS, {}
    # Units are assigned in adjacent pairs, so that a rank's shares of the even units and of all units are equal.
    for number in (n for n in range(UNITS) if n // 2 % backend.world_size == backend.rank):
        part = keys[number * size : (number + 1) * size]
        inputs, targets, missing = readable(source.train.__getitems__(part))
        if len(missing) == size:
            raise UserError(f"--samples: none of {size} samples can be read: {missing[0]}")
        source.task.check(targets, part.indices[[n for n in range(size) if n not in missing]], inputs)
        dtype = backend.dtype if inputs.is_floating_point() else None
        of_targets = backend.dtype if targets.is_floating_point() else None
        found[number] = inputs.to(backend.device, dtype), targets.to(backend.device, of_targets)
    return found


def _advance(optimizer: torch.optim.Optimizer, size: int, num_samples: int, mean: Tensor, variance: Tensor) -> None:
    """Step the optimizer with the expected moments of its next update, at learning rate zero so that no weight changes.

    Args:
        optimizer: the optimizer, with the hyper-parameters of the update.
        size: size of the batch whose squared gradient the second moment averages.
        num_samples: N, number of samples in ``mean``.
        mean: ghat, the mean gradient, (P,).
        variance: sigma^2 of a sample, (P,). The expected square is ghat^2 + (1/size - 1/N) sigma^2.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    parts = zip(params, *(whole.split([p.numel() for p in params]) for whole in (mean, variance)), strict=True)
    variances: dict[Tensor, Tensor] = {}
    for p, of_mean, of_variance in parts:
        p.grad, variances[p] = of_mean.view_as(p), of_variance.view_as(p)
    if isinstance(optimizer, AdaptiveOptimizer):
        share, kappa = 1.0 / size - 1.0 / num_samples, num_samples / size
        optimizer.moment_source = lambda _, chosen: Moment(
            [variances[p] for p in chosen], share, kappa=kappa, of_variance=True
        )
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    for group, lr in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = lr
    optimizer.zero_grad()


def _measure(
    run: Run,
    source: Source,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    backend: Backend,
    at: int,
    samples: int,
) -> Place:
    """Return the measurement at the current state of the model and optimizer, after ``at`` samples. This is a collective."""
    config, plan = run.config, run.plan
    # After the end of the run, use the last update's learning rate, and a full batch that is not cut at the end.
    last = min(at, plan.total_samples - 1)
    size = plan.full_batch_size(last)
    values = replace(plan, total_samples=plan.total_samples + size, at_epoch_end="carry").at(last)
    set_hyperparameters(optimizer, values)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    pass_size = config.batch.micro_size or max(1, LARGEST_PASS // run.group_size) * run.group_size
    units = _units(run, source, backend, at, samples)
    surface = LossSurface(model, params, source.task, backend, units, pass_size, config.seed)
    noise, mean, variance = surface.noise()
    squared = size if run.second_moment is None else config.batch.reference_size
    _advance(optimizer, squared, samples, mean, variance)
    scale = torch.cat([part.rsqrt().nan_to_num_(0.0, 0.0, 0.0) for part in _divisors(optimizer)])
    del mean, variance
    low, high = surface.eigenvalue(scale)
    group = optimizer.param_groups[0]
    b = momentum_of(group)
    rate = gain_of(optimizer, group) * lookahead_of(group) / (1.0 - b)
    middle = (low + high) / 2.0
    shares = tuple(stability_share(rate, max(value, 0.0), b) for value in (low, middle, high))
    return Place(at, at / plan.samples_per_epoch, size, config.batch.reference_size, (low, high), shares, noise)


def _divisors(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Yield D for each parameter, flattened to (p,)."""
    for group in optimizer.param_groups:
        states = [optimizer.state[p] for p in group["params"]]
        # The optimizers of a run keep their own counts.
        for p, divisor in zip(
            group["params"], denominators(optimizer, group, states, [0.0] * len(states)), strict=True
        ):
            yield (divisor if isinstance(divisor, Tensor) else torch.full_like(p, divisor)).detach().reshape(-1)


def _places(config: Config, path: Path | None) -> tuple[list[Checkpoint | None], list[str]]:
    """Return the checkpoints to measure at, oldest first, or [None] for the beginning; and notes on those left out.

    Raises:
        UserError: if there is none, or one belongs to another run.
    """
    if path is None:
        return [None], []
    is_one = samples_of(path) is not None
    saved = [path] if is_one else CheckpointFolder(path / CHECKPOINTS).saved()
    found: list[Checkpoint | None] = []
    notes = []
    for place in saved:
        problems = find_problems(place) if place.is_dir() else ["it does not exist"]
        if problems:
            notes.append(f"{place} is left out: {problems[0]}")
            continue
        state = read_run_state(place)
        check_same_run(config, state["config"], place, is_branch=True)
        found.append(Checkpoint(place, state))
    if not found:
        expected = f"{path}/{CHECKPOINTS}/samples-*" if not is_one else "a checkpoint that is whole"
        raise UserError(
            f"--checkpoint: {path} has none to measure at (expected {expected}){': ' if notes else ''}{'; '.join(notes)}"
        )
    return found, notes


def _check(run: Run, num_train: int, num_samples: int) -> int:
    """Return the number of samples to measure on, a multiple of the units and of the group size.

    Raises:
        UserError: if the size of the run's steps is not known, or there are too few samples.
    """
    config, least = run.config, UNITS * run.group_size
    if config.optimizer.optimizer_class not in KNOWN:
        raise UserError(
            f"optimizer.name: expected sgd, rmsprop, adam or adamw, got {config.optimizer.name}: how far a gradient moves its "
            "weight is not known of it, and so neither is the largest stable step"
        )
    if config.scaling.rule == "adascale":
        raise UserError("scaling.rule: adascale measures its rate in every update; expected linear, sqrt or none")
    samples = min(num_samples, num_train) // least * least
    if samples < least:
        raise UserError(
            f"--samples: expected {least:,} or more ({UNITS} units of {run.group_size}), got {min(num_samples, num_train):,}"
        )
    return samples


def measure_limit(
    config: Config, path: Path | None, num_samples: int, console: Console, ranks: Ranks | None = None
) -> list[Place]:
    """Measure and print the largest batch size with stable steps for a config; on one process or under torchrun.

    Args:
        config: the config.
        path: a checkpoint, or a run folder for all of its checkpoints; None for the initial weights.
        num_samples: number of training samples to measure on.
        console: the console to print to.
        ranks: the rank of this process and the number of ranks; None to read the environment that torchrun sets.

    Raises:
        UserError: for any problem that the user can correct.
    """
    ranks = launched_ranks() if ranks is None else ranks
    path = None if path is None else user_path(path, "--checkpoint")
    found, notes = _places(config, path)
    source = config.data.load(config.seed)
    model = build_model(config, source.task)
    run = resolve(config, len(source.train), ranks.world_size, norm_group_size(model))
    samples = _check(run, len(source.train), num_samples)
    # With any training engine, every rank has the whole model here, at full precision because curvature needs it.
    engine = BackendConfig(name="ddp", device=config.backend.device, timeout_seconds=config.backend.timeout_seconds)
    backend = create_backend(engine, "fp64" if config.precision == "fp64" else "fp32", ranks)
    try:
        model.to(backend.device, backend.dtype)
        settings = config.optimizer
        groups = param_groups(model, settings.weight_decay, settings.decay_norm_and_bias, squares=False)
        optimizer = settings.build(groups, config.batch.reference_size)
        places = []
        for checkpoint in found:
            at, here = 0, run
            if checkpoint is not None:
                load_named_state(checkpoint.path, model, optimizer)
                load_group_state(optimizer, checkpoint.state["groups"])
                at = checkpoint.state["progress"]["samples_seen"]
                growth = tuple((start, size) for start, size in checkpoint.state.get("growth", ()))
                here = replace(run, plan=replace(run.plan, growth=growth))
            places.append(_measure(here, source, model, optimizer, backend, at, samples))
    finally:
        backend.close()
    if ranks.rank == 0:
        print_warnings(console, notes)
        console.print(limit_table(places, config.optimizer.name, len(source.train)))
        console.print(describe_limit(places, len(source.train)), highlight=False)
        if path is not None and len(places) > 1:
            _draw(path, places, len(source.train), console)
    return places


def _draw(folder: Path, places: list[Place], num_train: int, console: Console) -> None:
    """Draw limit.png into a run folder, or print why it was not drawn."""
    try:
        from largebatch.reporting.plots import plot_limit

        console.print(f"over training it is in {plot_limit(places, folder / 'limit.png', num_train)}", highlight=False)
    except Exception as error:  # a failed plot does not fail the measurement
        print_warnings(console, (f"{folder / 'limit.png'} was not drawn: {cause_of(error)}",))
