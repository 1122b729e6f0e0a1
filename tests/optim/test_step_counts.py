"""Averages count the updates of their own parameter: layers unfrozen late, and branches that only some updates use."""

import copy

import pytest
import torch

from largebatch import batch_size_invariant, optim, track
from largebatch.distributed import BackendConfig, Ranks, create_backend
from largebatch.distributed.state import group_state, load_group_state, write_tensors
from largebatch.moments import is_shadow

BATCH, REFERENCE = 8, 4
OPTIMIZERS = {
    "adam": lambda groups: optim.Adam(groups, 0.05, (0.8, 0.9), weight_decay=0.1),
    "adamw": lambda groups: optim.AdamW(groups, 0.05, (0.8, 0.9), weight_decay=0.1, reference_batch_size=REFERENCE),
    "adam, running mean": lambda groups: optim.Adam(groups, 0.05, (0.8, 0.9), bias_correction="running_mean"),
    "rmsprop": lambda groups: optim.RMSProp(groups, 0.02, 0.9, momentum=0.5, bias_correction="running_mean"),
    "rmsprop, centered": lambda groups: optim.RMSProp(groups, 0.02, 0.9, centered=True, bias_correction="running_mean"),
    "adagrad": lambda groups: optim.Adagrad(groups, 0.05),
    "quench": lambda groups: optim.Quench(groups, 0.5, K=20),
    "lamb": lambda groups: optim.LAMB(groups, 0.05, (0.8, 0.9), weight_decay=0.1),
    "lars": lambda groups: optim.LARS(groups, 0.05, 0.9),
    "sgd": lambda groups: optim.SGD(groups, 0.05, 0.9, form="average"),
}
WITH_SQUARES = ("adamw", "rmsprop", "adagrad", "lamb", "quench of samples")
THEIRS = {
    "adam": (torch.optim.Adam, optim.Adam, {"weight_decay": 0.1}),
    "adamw": (torch.optim.AdamW, optim.AdamW, {"betas": (0.9, 0.99)}),
}
# By parameter, whether an update gives it a gradient.
USES = (lambda update: True, lambda update: update >= 9, lambda update: update % 3 == 1, lambda update: update == 4)


def parameters_of(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(3, 2, generator=generator, dtype=dtype)) for _ in USES]


def steps(optimizers, parameters, first, last, uses=USES):
    """Step on gradients that update and parameter determine."""
    for update in range(first, last):
        generator = torch.Generator().manual_seed(update)
        for p, used in zip(parameters, uses, strict=True):
            gradient = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            p.grad = gradient if used(update) else None
        for optimizer in optimizers:
            if hasattr(optimizer, "set_batch"):
                optimizer.set_batch(BATCH)
            optimizer.step()


def close(ours, theirs, tolerance=1e-12):
    for mine, value in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.detach(), value.detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_parameter_is_updated_as_by_an_optimizer_of_its_own(name):
    ours, alone = parameters_of(), parameters_of()
    steps([OPTIMIZERS[name](ours)], ours, 0, 40)
    steps([OPTIMIZERS[name]([p]) for p in alone], alone, 0, 40)
    close(ours, alone)


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("frozen", [1, 100, 1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_layer_unfrozen_later_takes_torchs_steps(name, frozen):
    theirs, ours, arguments = THEIRS[name]
    found = []
    for cls in (theirs, ours):
        parameters = parameters_of()[:2]
        optimizer = cls(parameters, lr=0.01, **arguments)
        parameters[1].requires_grad_(False)
        steps([optimizer], parameters, 0, frozen, (lambda _: True, lambda _: False))
        parameters[1].requires_grad_(True)
        steps([optimizer], parameters, frozen, frozen + 20, (lambda _: True, lambda update: update % 3))
        found.append(parameters)
    close(*found)


@pytest.mark.parametrize("name", THEIRS)
def test_a_branch_of_some_updates_takes_torchs_steps(name):
    theirs, ours, arguments = THEIRS[name]
    found = []
    for cls in (theirs, ours):
        parameters = parameters_of()[:2]
        steps(
            [cls(parameters, lr=0.01, **arguments)], parameters, 0, 64, (lambda _: True, lambda update: update % 8 < 5)
        )
        found.append(parameters)
    close(*found)


class Branches(torch.nn.Module):
    """Adds up the branches that a pass takes."""

    def __init__(self):
        super().__init__()
        self.branches = torch.nn.ModuleList(torch.nn.Linear(3, 2, dtype=torch.float64) for _ in USES)

    def forward(self, x, taken):
        return sum(self.branches[number](x) for number in taken)


def tracked(name, per, number=None):
    """Train a tracked model; with a number, its branch alone is in the optimizer. Return the branches' weights."""
    torch.manual_seed(0)
    model = track(Branches(), per)
    for index, branch in enumerate(model.branches):
        branch.requires_grad_(number is None or index == number)
    groups = optim.param_groups(model, 0.1)
    make = {
        "adamw": lambda: optim.AdamW(groups, 0.05, (0.8, 0.9), reference_batch_size=2),
        "rmsprop": lambda: optim.RMSProp(groups, 0.02, 0.9, bias_correction="running_mean", reference_batch_size=2),
        "adagrad": lambda: optim.Adagrad(groups, 0.05, reference_batch_size=2),
        "lamb": lambda: optim.LAMB(groups, 0.05, (0.8, 0.9), reference_batch_size=2),
        "quench of samples": lambda: optim.Quench(groups, 0.5, K=20, sigma2="sample"),
    }
    optimizer = make[name]()
    for update in range(20):
        taken = [index for index, used in enumerate(USES) if used(update)]
        for part in range(2):
            generator = torch.Generator().manual_seed(2 * update + part)
            x = torch.randn(BATCH // 2, 3, dtype=torch.float64, generator=generator)
            # Each branch's gradient depends on no other branch, so that it may be trained alone.
            loss = (model(x, taken) * x.sum(1, keepdim=True).sin()).sum() / BATCH
            if loss.requires_grad:
                loss.backward()
        optimizer.set_batch(BATCH, 2 if per == "micro_batch" else BATCH)
        optimizer.step()
        optimizer.zero_grad()
    return [[p for p in branch.parameters() if not is_shadow(p)] for branch in model.branches]


@pytest.mark.parametrize("per", ["micro_batch", "sample"])
@pytest.mark.parametrize("name", WITH_SQUARES)
def test_tracked_squares_are_of_the_updates_that_used_the_parameter(name, per):
    together = tracked(name, per)
    for number in range(len(USES)):
        close(together[number], tracked(name, per, number)[number])


def test_batch_size_invariant_counts_by_parameter_whichever_optimizer_is_within():
    """Around torch's AdamW and this package's, which it treats in two ways."""
    found = []
    for cls in (torch.optim.AdamW, optim.AdamW):
        torch.manual_seed(0)
        model = Branches()
        optimizer = batch_size_invariant(
            cls(model.parameters(), 0.01, (0.9, 0.99)), reference_batch_size=2, micro_batch_size=4
        )
        for update in range(30):
            for part in range(2):
                generator = torch.Generator().manual_seed(2 * update + part)
                x = torch.randn(4, 3, dtype=torch.float64, generator=generator)
                taken = [index for index, used in enumerate(USES) if used(update)]
                (model(x, taken).sin().sum(1).mean() / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(list(model.parameters()))
    close(*found, tolerance=1e-9)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_counts_go_through_a_state_dict(name):
    expected, parameters, resumed = parameters_of(), parameters_of(), parameters_of()
    steps([OPTIMIZERS[name](expected)], expected, 0, 30)
    optimizer, other = OPTIMIZERS[name](parameters), OPTIMIZERS[name](resumed)
    steps([optimizer], parameters, 0, 13)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with torch.no_grad():
        for mine, value in zip(resumed, parameters, strict=True):
            mine.copy_(value)
    steps([other], resumed, 13, 30)
    assert all(torch.equal(mine, value) for mine, value in zip(resumed, expected, strict=True))


def as_before(optimizer, groups, state):
    """Write counts as an earlier release did: one for all of a group, in the group."""
    for name in optimizer.count_names:
        counts = [values.pop(name) for values in state if name in values]
        if counts:
            groups[0][name] = counts[0]


@pytest.mark.parametrize(
    "name", [name for name in OPTIMIZERS if getattr(OPTIMIZERS[name]([torch.ones(1)]), "count_names", ())]
)
def test_a_state_dict_of_an_earlier_release_keeps_its_count(name):
    """A parameter without state in it has had no update."""
    uses = lambda _: True, lambda update: update >= 9, lambda update: update >= 9, lambda update: update >= 20
    expected, parameters = parameters_of(), parameters_of()
    steps([OPTIMIZERS[name](expected)], expected, 0, 30, uses)
    optimizer = OPTIMIZERS[name](parameters)
    steps([optimizer], parameters, 0, 7, uses)
    old = copy.deepcopy(optimizer.state_dict())
    as_before(optimizer, old["param_groups"], old["state"].values())
    other = OPTIMIZERS[name](parameters)
    other.load_state_dict(old)
    steps([other], parameters, 7, 30, uses)
    assert all(torch.equal(mine, value) for mine, value in zip(parameters, expected, strict=True))


@pytest.mark.parametrize("is_old", [False, True])
def test_counts_go_through_a_checkpoint_new_or_old(is_old, tmp_path):
    def begin():
        torch.manual_seed(0)
        backend = create_backend(BackendConfig(device="cpu"), "fp64", Ranks(0, 0, 1))
        model = Branches()
        return backend, *backend.prepare(model, lambda m: optim.AdamW(m.parameters(), 0.05, (0.8, 0.9)))

    uses = lambda _: True, lambda update: update >= 9, lambda _: False, lambda update: update >= 20

    def train(backend, model, optimizer, first, last):
        for update in range(first, last):
            with backend.accumulate(sync=True):
                x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(update))
                backend.backward(model(x, [n for n, used in enumerate(uses) if used(update)]).sin().sum())
            backend.step(optimizer)

    backend, expected, optimizer = begin()
    train(backend, expected, optimizer, 0, 30)
    backend, model, optimizer = begin()
    train(backend, model, optimizer, 0, 7)
    groups = group_state(optimizer)
    if is_old:
        as_before(optimizer, groups, optimizer.state.values())
    write_tensors(tmp_path, backend.state(model, optimizer), None)
    train(backend, model, optimizer, 7, 12)  # what the checkpoint does not know of is gone when it is loaded
    backend.load_state(tmp_path, model, optimizer)
    load_group_state(optimizer, groups)
    train(backend, model, optimizer, 7, 30)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), expected.parameters(), strict=True))
