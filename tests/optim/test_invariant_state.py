"""Rates, schedules, state, copies and the critical batch size of `batch_size_invariant`."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
from loops import EXACT, MAKERS, build, by_hand, data, equal, mean_loss, ours, pieces, trained, weights
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import largebatch
from largebatch import batch_size_invariant, optim
from largebatch.errors import UserError
from largebatch.scaling.schedules import Constant, Cosine, Step, Warmup


def test_per_group_rates_and_torchs_schedulers():
    """Schedulers read and write the reference's rates; the step scales what they wrote."""
    model, (inputs, targets) = build(), data()
    optimizer = batch_size_invariant(
        torch.optim.AdamW([{"params": model[0].parameters(), "lr": 0.01}, {"params": model[2].parameters()}], 0.001),
        reference_batch_size=2,
        micro_batch_size=6,
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    warm = torch.optim.lr_scheduler.OneCycleLR(
        batch_size_invariant(torch.optim.AdamW(model.parameters()), reference_batch_size=2, micro_batch_size=6), 0.1, 10
    )
    assert warm.get_last_lr()
    steps = []
    optimizer.base.register_step_pre_hook(lambda o, *_: steps.append([group["lr"] for group in o.param_groups]))
    for _ in range(3):
        mean_loss(model, inputs[:6], targets[:6]).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    factors = [1.0, *[0.5 * (1 + math.cos(math.pi * k / 10)) for k in (1, 2)]]
    assert steps == [[pytest.approx(0.03 * f), pytest.approx(0.003 * f)] for f in factors]
    assert [group["initial_lr"] for group in optimizer.param_groups] == [0.01, 0.001]


def test_a_tensor_as_learning_rate_stays_the_same_tensor():
    lr = torch.tensor(0.01, dtype=torch.float64)
    found, optimizer = ours("adamw", equal(2, 6), 2, 6, make=lambda p: torch.optim.AdamW(p, lr, weight_decay=0.1))
    assert optimizer.param_groups[0]["lr"] is lr
    torch.testing.assert_close(found, by_hand("adamw", equal(2, 6), 2), **EXACT)


def test_schedules_in_samples_with_a_warm_up_and_a_growing_batch():
    schedule, warmup = Step((48, 96), 0.5), Warmup("gradual", 24, 0.25)
    model, (inputs, targets) = build(), data(512)
    optimizer = batch_size_invariant(MAKERS["adamw"](model.parameters()), reference_batch_size=2, micro_batch_size=4)
    scheduler = optim.SampleScheduler(optimizer, schedule, warmup)
    sizes, rates, seen = [], [], 0
    for _ in range(12):
        size = scheduler.batch_size(8, realize="batch")
        for _ in range(size // 4):
            (mean_loss(model, inputs[:4], targets[:4]) / (size // 4)).backward()
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        scheduler.step()  # as Accelerate does on several processes
        sizes.append(optimizer.batch_size)
        assert rates[-1] == pytest.approx(0.01 * schedule(seen) * warmup.of_lr(seen))
        seen += size
        assert optimizer.samples_seen == seen
    assert sizes == [8] * 6 + [16] * 3 + [32] * 3
    assert optim.SampleScheduler(optimizer, Cosine(seen)).get_last_lr() == [0.0]
    with pytest.raises(UserError, match="expected what batch_size_invariant returned"):
        optim.SampleScheduler(torch.optim.SGD(model.parameters(), 0.1), Constant())


@pytest.mark.parametrize("count", [1, 2])
def test_a_resume_is_exact(count):
    whole, _ = trained(20, count=count)
    model, optimizer = trained(9, count=count)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = build(seed=3)
    resumed.load_state_dict(saved["model"])
    other = batch_size_invariant(MAKERS["adamw"](resumed.parameters()), reference_batch_size=2, micro_batch_size=6)
    other.load_state_dict(saved["optimizer"])
    assert other.samples_seen == optimizer.samples_seen == 9 * 6 * count
    trained(11, other, resumed, count, start=9)
    assert torch.equal(weights(resumed), weights(whole))
    with pytest.raises(UserError, match="was saved with 2, this optimizer has 4"):
        batch_size_invariant(
            MAKERS["adamw"](build().parameters()), reference_batch_size=4, micro_batch_size=6
        ).load_state_dict(saved["optimizer"])


def test_a_trained_optimizer_keeps_its_state_and_goes_back_to_torch():
    """Trained by torch at the reference, wrapped, trained, and plain again: at one batch size all of it is torch."""

    def parts(wrap):
        model, (inputs, targets) = build(), data()
        optimizer = MAKERS["adamw"](model.parameters())
        for phase in range(3):
            if phase == 1 and wrap:
                optimizer = batch_size_invariant(optimizer, reference_batch_size=12, micro_batch_size=6)
            elif phase == 2 and wrap:
                optimizer = optimizer.to_torch()
                assert type(optimizer) is torch.optim.AdamW
            for _ in range(5):
                for u in pieces([6, 6]):
                    (mean_loss(model, inputs[u], targets[u]) / 2).backward()
                optimizer.step()
                optimizer.zero_grad()
        return weights(model), optimizer

    (found, optimizer), (expected, plain) = parts(True), parts(False)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert optimizer.state_dict()["state"].keys() == plain.state_dict()["state"].keys()
    model = build()
    wrapped = batch_size_invariant(MAKERS["adamw"](model.parameters()), reference_batch_size=2, micro_batch_size=6)
    wrapped.load_state_dict(plain.state_dict())  # a plain one's state
    assert float(wrapped.state[model[0].weight]["step"]) == 15


def test_to_torch_hands_over_the_average_and_not_its_bias():
    """After a batch that grew: what Adam divides by is the same before and after."""
    model, optimizer = trained(3, count=1)
    trained(3, optimizer, model, count=4)
    count = optimizer._progress.counts[model[0].weight]
    true = optimizer.state[model[0].weight]["exp_avg_sq"].clone() / count.stretch / (1 - math.exp(count.log_decay))
    plain = optimizer.to_torch()
    state = plain.state[model[0].weight]
    torch.testing.assert_close(state["exp_avg_sq"] / (1 - 0.999 ** float(state["step"])), true, **EXACT)


def test_copies_and_pickles():
    """An average of the weights, a deep copy of model and optimizer, a pickle of both: none warns, each trains alike."""
    model, optimizer = trained(5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copy.deepcopy(model)
        torch.optim.swa_utils.AveragedModel(model)
        torch.save(model, io.BytesIO())
        copied_model, copied = copy.deepcopy((model, optimizer))
        pickled_model, pickled = pickle.loads(pickle.dumps((model, optimizer)))
    for other_model, other in ((copied_model, copied), (pickled_model, pickled)):
        assert all(p in set(other_model.parameters()) for group in other.param_groups for p in group["params"])
        trained(5, other, other_model, start=5)
    trained(5, optimizer, model, start=5)
    assert torch.equal(weights(copied_model), weights(model)) and torch.equal(weights(pickled_model), weights(model))


# What is refused, and what is said


def test_what_is_not_known_is_refused_by_name():
    model = build()
    for optimizer, match in (
        (torch.optim.NAdam(model.parameters()), "expected Adam, AdamW, RMSprop, Adagrad, SGD of torch.optim.*got torch.optim.nadam.NAdam"),
        (torch.optim.Adam([nn.Parameter(torch.zeros(2, dtype=torch.complex64))]), "is complex"),
        (torch.optim.Adagrad(model.parameters(), lr_decay=0.1), "lr_decay: expected 0, got 0.1"),
        (torch.optim.Adam(model.parameters(), betas=(0.9, 0.0)), "beta2"),
        (torch.optim.AdamW(largebatch.track(build()).parameters()), "the model is tracked.*untrack"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=match):
            batch_size_invariant(optimizer, reference_batch_size=2, micro_batch_size=2)
    good = {"reference_batch_size": 2, "micro_batch_size": 2}
    for bad in ({"reference_batch_size": 0}, {"micro_batch_size": 0}, {"loss": "median"}):
        with pytest.raises(UserError, match=f"{next(iter(bad))}: expected"):
            batch_size_invariant(torch.optim.Adam(model.parameters()), **{**good, **bad})
    optimizer = batch_size_invariant(torch.optim.Adam(model.parameters()), **good)
    with pytest.raises(UserError, match="set_batch: expected"):
        optimizer.set_batch(0)
    with pytest.raises(UserError, match="micro_batch: expected"):
        optimizer.micro_batch(0)
    with pytest.raises(UserError, match="already within"), optimizer.micro_batch(), optimizer.micro_batch():
        pass


def test_gradients_from_before_the_line_are_an_error():
    model, (inputs, targets) = build(), data()
    mean_loss(model, inputs, targets).backward()
    optimizer = batch_size_invariant(torch.optim.Adam(model.parameters()), reference_batch_size=2, micro_batch_size=48)
    with pytest.raises(UserError, match="no backward pass since the last update left it"):
        optimizer.step()


def test_the_size_is_read_from_a_loader():
    dataset = TensorDataset(torch.zeros(50, 5))
    model = build()

    def line(loader):
        return batch_size_invariant(
            torch.optim.Adam(model.parameters()), reference_batch_size=2, micro_batch_size=loader
        )

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert line(DataLoader(dataset, 8, drop_last=True)).micro_batch_size == 8
        assert line(DataLoader(dataset, 10)).micro_batch_size == 10
    with pytest.warns(UserWarning, match="last batch of an epoch has 2 of 8 samples"):
        line(DataLoader(dataset, 8))
    with pytest.raises(UserError, match="expected a number of samples or a DataLoader"):
        line(DataLoader(dataset, None))


def test_the_critical_batch_size_and_its_one_warning():
    """A linear problem whose noise is known: B_simple = tr(Sigma)/|G|^2, inside the band, and a batch far above it is told of."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.zeros(20, dtype=torch.float64))
    mean = torch.full((20,), 0.5, dtype=torch.float64)

    def train(optimizer, size, steps=200):
        for _ in range(steps):
            for _ in range(4):
                target = mean + torch.randn(size // 4, 20, generator=generator, dtype=torch.float64)
                ((target * weight).sum(1).mean() / 4).backward()
            optimizer.step()
            optimizer.zero_grad()

    true = 20 / (20 * 0.25)  # = 4
    with pytest.warns(UserWarning, match=r"64 samples is above the critical batch size") as caught:
        optimizer = batch_size_invariant(torch.optim.SGD([weight], 0.0), reference_batch_size=4, micro_batch_size=16)
        train(optimizer, 64)
    assert len([w for w in caught if "critical" in str(w.message)]) == 1
    noise = optimizer.critical_batch_size
    assert noise.low < true < noise.high and noise.high < 2 * true
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(batch_size_invariant(torch.optim.SGD([weight], 0.0), reference_batch_size=4, micro_batch_size=1), 4, 60)


# Optimizers of this package


@pytest.mark.parametrize(
    "make",
    [
        lambda p, **r: optim.AdamW(p, 0.01, weight_decay=0.1, **r),
        lambda p, **r: optim.Adam(p, 0.01, bias_correction="running_mean", **r),
        lambda p, **r: optim.RMSProp(p, 0.01, centered=True, exponent=1.0, **r),
        lambda p, **r: optim.Adagrad(p, 0.01, **r),
        lambda p, **r: optim.LAMB(p, 0.01, **r),
    ],
)
def test_ours_are_what_a_tracked_model_makes_of_them(make):
    inputs, targets = data()
    model, tracked = build(), largebatch.track(build(), per="micro_batch")
    optimizer = batch_size_invariant(make(model.parameters()), reference_batch_size=4, micro_batch_size=6)
    groups = optim.param_groups(tracked, 0.1 if "AdamW" in repr(optimizer.base) else 0.0, decay_norm_and_bias=True)
    of_tracked = make(groups, reference_batch_size=4)
    for group in of_tracked.param_groups:
        group["weight_decay"] = optimizer.param_groups[0]["weight_decay"]
    values = {"lr": 0.03}
    if "betas" in optimizer.param_groups[0]:
        values["betas"] = (0.9, 0.999**3)
    elif "alpha" in optimizer.param_groups[0]:
        values["alpha"] = 0.99**3
    optim.set_hyperparameters(of_tracked, values)
    for _ in range(8):
        for u in pieces([6, 6]):
            (mean_loss(model, inputs[u], targets[u]) / 2).backward()
            (mean_loss(tracked, inputs[u], targets[u]) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        of_tracked.set_batch(12, 2)
        of_tracked.step()
        of_tracked.zero_grad()
    expected = torch.cat([v.flatten() for v in tracked.state_dict().values()])
    torch.testing.assert_close(weights(model), expected, **EXACT)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(
    "make",
    [
        lambda p: optim.SGD(p, 0.01, momentum=0.9, form="velocity"),
        lambda p: optim.LARS(p, 0.01),
        lambda p: optim.Quench(p, K=16),
        lambda p: optim.AdamW(p, 0.01),
    ],
)
def test_ours_train_with_one_unit_and_two(make, count):
    model = build()
    before = weights(model)
    optimizer = batch_size_invariant(make(model.parameters()), reference_batch_size=2, micro_batch_size=6)
    trained(12, optimizer, model, count)
    assert float((weights(model) - before).abs().max()) > 1e-4 and weights(model).isfinite().all()
    assert optimizer.lr_scale == (1.0 if isinstance(optimizer.base, optim.Quench) else 3.0 * count)


# Types and layouts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("count", [1, 4])
def test_narrow_parameters(dtype, count):
    """Squares are float32 whatever the parameters are; the update is the float64 one to the parameters' rounding."""
    results = []
    for kind in (dtype, torch.float64):
        model, (inputs, targets) = build().to(dtype).to(kind), data()
        inputs, targets = inputs.to(dtype).to(kind), targets.to(dtype).to(kind)
        optimizer = batch_size_invariant(
            torch.optim.AdamW(model.parameters(), 0.01, eps=1e-4), reference_batch_size=2, micro_batch_size=6
        )
        for u in [pieces([6] * count)] * 3:
            for unit in u:
                (mean_loss(model, inputs[unit], targets[unit]) / count).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        results.append(weights(model).double())
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=20 * torch.finfo(dtype).eps)


def test_channels_last():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 2)).double()
    results = []
    for network in (plain, copy.deepcopy(plain).to(memory_format=torch.channels_last)):
        generator = torch.Generator().manual_seed(0)
        optimizer = batch_size_invariant(
            torch.optim.AdamW(network.parameters(), 0.01), reference_batch_size=1, micro_batch_size=4
        )
        for _ in range(5):
            for _ in range(2):
                images = torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64)
                (network(images).square().mean() / 2).backward()
            nn.utils.clip_grad_norm_(network.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
        results.append(torch.cat([p.detach().flatten() for p in network.parameters()]))
    torch.testing.assert_close(*results, **EXACT)


def test_memory_is_one_buffer_of_the_parameters():
    for count in (1, 2):
        _, optimizer = trained(3, count=count)
        (buffer, _, slots), *more = optimizer._squares._buffers
        numel = sum(p.numel() for p in build().parameters())
        assert not more and buffer.numel() == numel + 2 * len(slots) + 3
        assert all(slot.partial is None for slot in slots)


def test_through_torch_distributed_checkpoint(rank_pool, tmp_path):
    """Its state by name, written and read, goes on as if never stopped."""
    found, expected = rank_pool(1, stopped_by_checkpoint, str(tmp_path))[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def stopped_by_checkpoint(rank, world_size, folder):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    whole, optimizer = trained(3)
    model = copy.deepcopy(whole)
    dcp.save({"optimizer": get_optimizer_state_dict(whole, optimizer)}, checkpoint_id=folder)
    other = batch_size_invariant(MAKERS["adamw"](model.parameters()), reference_batch_size=2, micro_batch_size=6)
    state = {"optimizer": get_optimizer_state_dict(model, other)}
    dcp.load(state, checkpoint_id=folder)
    set_optimizer_state_dict(model, other, state["optimizer"])
    assert other.samples_seen == optimizer.samples_seen == 36
    trained(5, optimizer, whole, start=3)
    trained(5, other, model, start=3)
    return weights(model), weights(whole)
