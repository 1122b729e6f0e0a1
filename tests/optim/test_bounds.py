"""Where single estimates of a second moment may be negative: below the reference, and of micro-batches of unequal size."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from largebatch import batch_size_invariant, optim

PAIRS = {
    "adam": (torch.optim.Adam, optim.Adam, {"betas": (0.9, 0.99)}),
    "adam, no momentum": (torch.optim.Adam, optim.Adam, {"betas": (0.0, 0.9)}),
    "rmsprop": (torch.optim.RMSprop, optim.RMSProp, {"alpha": 0.9}),
    "centered": (torch.optim.RMSprop, optim.RMSProp, {"alpha": 0.9, "centered": True}),
    "adagrad": (torch.optim.Adagrad, optim.Adagrad, {}),
}
# Sizes of the micro-batches of each update, and the reference: growing below it, falling below it and coming back, unequal
# ones above it whose share of q is above 1, and below 1.
BATCHES = {
    "growing": ([[4, 4]] * 3 + [[8, 8]] * 3 + [[16, 16]] * 3, 64),
    "falling": ([[8, 8]] * 3 + [[2, 2]] + [[8, 8]] * 3 + [[2, 2], [8, 8]], 16),
    "unequal": ([[32, 2]] * 9, 4),
    "unequal, a small share": ([[32, 4]] * 9, 30),
}


def trained(make, batches, reference, options, count=500, seed=0):
    """Return the places of elements after updates by noise, (updates, count), in units of lr."""
    generator = torch.Generator().manual_seed(seed)
    parameter = nn.Parameter(torch.zeros(count, dtype=torch.float64))
    plain = make([parameter], lr=1.0, **options)
    optimizer = batch_size_invariant(plain, reference_batch_size=reference, micro_batch_size=1)
    places = []
    for sizes in batches:
        for size in sizes:
            gradient = torch.randn(count, generator=generator, dtype=torch.float64) / math.sqrt(size)
            with optimizer.micro_batch(size):
                ((parameter * gradient).sum() * size / sum(sizes)).backward()
        optimizer.step()
        optimizer.zero_grad()
        places.append(parameter.detach().clone())
    return torch.stack(places)


@pytest.mark.parametrize("batches", BATCHES)
@pytest.mark.parametrize("name", PAIRS)
def test_ours_and_torchs_take_the_same_steps_and_no_huge_ones(name, batches):
    torchs, ours, options = PAIRS[name]
    sizes, reference = BATCHES[batches]
    places = trained(torchs, sizes, reference, options)
    torch.testing.assert_close(trained(ours, sizes, reference, options), places, rtol=1e-9, atol=1e-9)
    kappas = torch.tensor([sum(batch) / reference for batch in sizes]).double()
    steps = places.diff(dim=0, prepend=places.new_zeros(1, places.shape[1])).abs().amax(1) / kappas
    assert steps.isfinite().all() and steps.max() < 60.0


@pytest.mark.parametrize("kappa", [1 / 16, 1 / 4, 7 / 8])
@pytest.mark.parametrize("make", [torch.optim.RMSprop, optim.RMSProp])
def test_a_centered_moment_keeps_a_variance(make, kappa):
    """Which 1e-8, eps, or NaN would take the place of; in the typical element it is that of the reference."""
    sizes = [[8, 8]] * 200
    places = trained(make, sizes, round(16 / kappa), {"alpha": 0.99, "centered": True}, count=200)
    assert places.isfinite().all()
    steps = places.diff(dim=0).abs() / kappa
    assert steps.max() < 60.0 / math.sqrt(kappa) and 0.2 < steps[100:].median() < 2.0 / math.sqrt(kappa)


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD, optim.AdamW, torch.optim.RMSprop])
def test_a_parameter_without_elements_is_passed_over(make):
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(0))]
    optimizer = batch_size_invariant(make(params, lr=0.1), reference_batch_size=1, micro_batch_size=1)
    for _ in range(12):
        for _ in range(2):
            sum(p.square().sum() for p in params).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert params[0].isfinite().all()


@pytest.mark.parametrize("make", [torch.optim.AdamW, optim.AdamW])
@pytest.mark.parametrize("passes", [1, 4])
def test_a_square_that_overflows_stops_its_element_and_no_more(make, passes):
    """As in plain Adam, whose second moment is infinite then; carried, it was NaN."""
    parameter = nn.Parameter(torch.ones(3))
    plain = make([parameter], lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
    optimizer = batch_size_invariant(plain, reference_batch_size=1, micro_batch_size=4 // passes)
    for update in range(8):
        scale = torch.tensor([1e30 if update == 2 else 1.0, 1.0, 2e19 if update == 2 else 1.0])
        for _ in range(passes):
            (parameter * scale).sum().div(passes).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert parameter.isfinite().all()
    assert float(parameter[1].detach()) < 0.8


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("name", ["SGD", "RMSProp", "Adagrad", "Adam", "AdamW", "LARS", "LAMB"])
def test_a_copy_of_our_optimizers_goes_on(name, wrapped, copied):
    more = {"SGD": {"momentum": 0.9, "form": "average"}, "RMSProp": {"bias_correction": "running_mean"}}.get(name, {})
    model = nn.Linear(3, 2)
    optimizer = getattr(optim, name)(model.parameters(), lr=0.1, **more)
    if wrapped:
        optimizer = batch_size_invariant(optimizer, reference_batch_size=1, micro_batch_size=2)
    both = model, optimizer
    step(*both)
    others = copied(both)
    for _ in range(2):
        step(*both)
        step(*others)
    for p, q in zip(both[0].parameters(), others[0].parameters(), strict=True):
        assert torch.equal(p, q)


def step(model, optimizer):
    for inputs in (torch.ones(2, 3), torch.eye(3)[:2]):
        model(inputs).square().mean().div(2).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("amsgrad", [False, True])
def test_updates_whose_gradients_are_zero_are_counted_at_their_batch_size(amsgrad):
    beta1, beta2, kappa, lr, eps = 0.9, 0.999, 4.0, 0.01, 1e-8
    parameter = nn.Parameter(torch.ones(5, dtype=torch.float64))
    adam = torch.optim.Adam([parameter], lr, (beta1, beta2), eps, amsgrad=amsgrad)
    optimizer = batch_size_invariant(adam, reference_batch_size=2, micro_batch_size=4)
    generator = torch.Generator().manual_seed(0)
    place, m, s, largest = (torch.full((5,), value, dtype=torch.float64) for value in (1.0, 0.0, 0.0, 0.0))
    for update in range(1, 9):
        units = torch.randn(2, 5, generator=generator, dtype=torch.float64) * (update not in (3, 4, 7))
        if units.any():
            for unit in units:
                ((parameter * unit).sum() / 2).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

        m = beta1 * m + (1 - beta1) * units.mean(0)
        s_ref = units.mean(0) ** 2 + (kappa - 1) * units.var(0) / 2
        s = beta2**kappa * s + (1 - beta2**kappa) * s_ref
        largest = torch.maximum(largest, s)
        corrected = (largest if amsgrad else s) / (1 - beta2 ** (kappa * update))
        place -= kappa * lr * m / (1 - beta1**update) / (corrected.sqrt() + eps)
        torch.testing.assert_close(parameter.detach(), place, rtol=1e-12, atol=1e-12)
