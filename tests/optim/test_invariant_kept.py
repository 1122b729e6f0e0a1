"""What the line keeps of earlier updates, where a loop around it saves, skips, clips, or exchanges what it trains."""

import copy
import gc
import warnings
import weakref

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from largebatch import batch_size_invariant
from largebatch.errors import UserError

REFERENCE, MICRO = 4, 8


def parameter(count=40):
    return nn.Parameter(torch.zeros(count, dtype=torch.float64))


def line(parameters, beta2=0.999, **options):
    adam = torch.optim.AdamW(parameters, 1e-3, betas=(0.9, beta2), weight_decay=0.0)
    return batch_size_invariant(adam, reference_batch_size=REFERENCE, micro_batch_size=MICRO, **options)


def backward(parameters, update, passes, scale=1.0):
    generator = torch.Generator().manual_seed(update)
    for _ in range(passes):
        noise = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
        terms = [(p * (0.5 + n)).sum() for p, n in zip(parameters, noise, strict=True)]
        (sum(terms) * (scale / passes)).backward()


def train(optimizer, parameters, updates, passes=2):
    for update in updates:
        backward(parameters, update, passes)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(("passes", "damping"), [(1, False), (4, False), (4, True)])
def test_first_updates_that_are_clipped_do_not_hide_the_loss_scale(passes, damping):
    """As torch.amp's recipe has it: the gradients are divided by the loss scale, and clipped until they are small."""
    found = []
    for scale in (1.0, 2.0**16):
        p = parameter()
        optimizer = line([p], damping=damping)
        for update in range(40):
            backward([p], update, passes, scale)
            p.grad.div_(scale)
            torch.nn.utils.clip_grad_norm_([p], 0.5 if update < 5 else 1e6)
            optimizer.step()
            optimizer.zero_grad()
        found.append((p.detach(), optimizer.state[p]["exp_avg_sq"], optimizer.critical_batch_size.noise_scale))
    tolerance = 0.05 if damping else 1e-9  # its averages begin anew when the scale is told
    torch.testing.assert_close(found[1][0], found[0][0], rtol=tolerance, atol=0.0)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-9, atol=0.0)
    if passes > 1:
        assert found[1][2] == pytest.approx(found[0][2], rel=0.5)


@pytest.mark.parametrize("through_disk", [False, True])
@pytest.mark.parametrize("damping", [False, True])
@pytest.mark.parametrize("flatten", [False, True])
def test_a_distributed_checkpoint_keeps_all_of_it(flatten, damping, through_disk, tmp_path):
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    torch.manual_seed(0)
    model = nn.Linear(5, 3).double()
    optimizer = line(model.parameters(), damping=damping)
    train(optimizer, list(model.parameters()), range(6))
    saved = copy.deepcopy((model.state_dict(), get_optimizer_state_dict(model, optimizer, options=options)))
    if through_disk:
        dcp.save({"optimizer": saved[1]}, checkpoint_id=tmp_path)
    train(optimizer, list(model.parameters()), range(6, 9))

    resumed = nn.Linear(5, 3).double()
    resumed.load_state_dict(saved[0])
    again = line(resumed.parameters(), damping=damping)
    state = saved[1]
    if through_disk:
        state = get_optimizer_state_dict(resumed, again, options=options)
        loaded = {"optimizer": state}
        dcp.load(loaded, checkpoint_id=tmp_path)
        state = loaded["optimizer"]
    set_optimizer_state_dict(resumed, again, state, options=options)
    assert again.samples_seen == 6 * 2 * MICRO
    train(again, list(resumed.parameters()), range(6, 9))
    for found, expected in zip(resumed.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_tensors_made_for_a_checkpoint_leave_training_as_it_is():
    found = []
    for saves in (False, True):
        p = parameter()
        optimizer = line([p], damping=True)
        for update in range(6):
            train(optimizer, [p], [update], passes=1 if update < 3 else 2)
            if saves:
                optimizer.state_dict()
        found.append(p.detach())
    torch.testing.assert_close(*found, rtol=0.0, atol=0.0)


def test_a_state_that_the_plain_optimizer_has_loaded_is_taken_up():
    p = parameter()
    optimizer = line([p], beta2=0.95)
    train(optimizer, [p], range(4), passes=1)
    train(optimizer, [p], range(4, 8))
    q = nn.Parameter(p.detach().clone())
    plain = torch.optim.AdamW([q], 1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with pytest.raises(UserError, match="saved with 4"):
        batch_size_invariant(copy.deepcopy(plain), reference_batch_size=5, micro_batch_size=MICRO)
    again = batch_size_invariant(plain, reference_batch_size=REFERENCE, micro_batch_size=MICRO)
    assert again.samples_seen == optimizer.samples_seen
    train(optimizer, [p], range(8, 11))
    train(again, [q], range(8, 11))
    torch.testing.assert_close(q, p, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("beta2", [0.95, 0.99, 0.999])
def test_a_second_moment_keeps_its_count_where_it_goes(beta2):
    """To another parameter, as where a scene's points are made denser; and it loses it where the state is cleared."""
    found = []
    for moves in (False, True):
        p = parameter()
        optimizer = line([p], beta2)
        train(optimizer, [p], range(3), passes=1)
        if moves:
            q = nn.Parameter(p.detach().clone())
            optimizer.param_groups[0]["params"] = [q]
            optimizer.state[q] = optimizer.state.pop(p)
            p = q
            optimizer.zero_grad()
        train(optimizer, [p], range(3, 9))
        found.append(p.detach())
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)

    p, q = parameter(), parameter()
    cleared, fresh = line([p], beta2), line([q], beta2)
    train(cleared, [p], range(3))
    cleared.state.clear()
    with torch.no_grad():
        p.zero_()
    for optimizer, trained in ((cleared, p), (fresh, q)):
        train(optimizer, [trained], range(3, 9))
    torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_a_step_within_a_micro_batch_is_refused():
    p = parameter()
    optimizer = line([p])
    backward([p], 0, 1)
    with pytest.raises(UserError, match="within a micro-batch"), optimizer.micro_batch(MICRO):
        backward([p], 1, 1)
        optimizer.step()


def test_a_batch_announced_for_a_skipped_update_is_forgotten():
    p = parameter()
    optimizer = line([p])
    backward([p], 0, 2)
    optimizer.set_batch(5)
    optimizer.zero_grad()  # a scaler that found an overflow has skipped the step
    train(optimizer, [p], [1])
    assert optimizer.batch_size == 2 * MICRO
    for size in (5, 6):  # announced first, at every update; the first is skipped
        optimizer.set_batch(size)
        optimizer.zero_grad()
        backward([p], size, 2)
    optimizer.step()
    assert optimizer.batch_size == 6


def test_what_has_ended_says_so():
    p = parameter()
    optimizer = line([p])
    train(optimizer, [p], range(2))
    plain = optimizer.to_torch()
    assert "batch_size_invariant" not in plain.param_groups[0]
    for use in (optimizer.to_torch, optimizer.step):
        with pytest.raises(UserError, match="has ended"):
            use()


def test_parameters_may_come_and_go_at_any_update():
    body, heads = parameter(), []
    optimizer = line([body])
    for update in range(40):
        head = parameter(1000)
        optimizer.add_param_group({"params": [head]})
        train(optimizer, [body, head], [update])
        optimizer.param_groups.pop()
        optimizer.state.pop(head)
        heads.append(weakref.ref(head))
    optimizer.zero_grad()
    train(optimizer, [body], [40])
    del head
    gc.collect()
    assert not any(reference() is not None for reference in heads)


def test_frozen_weights_that_never_train_are_left_alone():
    p, packed = parameter(), nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
    with torch.inference_mode():
        frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    optimizer = line([p, packed, frozen])
    train(optimizer, [p], range(3))
    again = line([p, packed, frozen])
    again.load_state_dict(optimizer.state_dict())
    assert again.samples_seen == 3 * 2 * MICRO


def test_a_refused_group_is_not_added():
    p = parameter()
    optimizer = line([p])
    with pytest.raises(UserError, match="complex"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, dtype=torch.complex64))]})
    train(optimizer, [p], [0])
    assert len(optimizer.param_groups) == 1


def test_a_model_may_change_its_type_where_torch_takes_it():
    model = nn.Linear(4, 2)
    optimizer = batch_size_invariant(
        torch.optim.SGD(model.parameters(), 0.1), reference_batch_size=2, micro_batch_size=4
    )
    for cast in (nn.Module.double, nn.Module.float, nn.Module.double):
        cast(model)
        for _ in range(2):
            model(torch.ones(4, 4, dtype=model.weight.dtype)).square().mean().div(2).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.samples_seen == 24


def test_too_few_passes_for_a_short_average_are_told_once():
    """With beta2 = 0.95 at 64 times the batch, two gradients an update are next to all that the second moment is of."""
    for passes, beta2, expected in ((2, 0.95, 1), (8, 0.95, 0), (2, 0.999, 0)):
        p = parameter()
        adam = torch.optim.Adam([p], 1e-3, betas=(0.9, beta2))
        optimizer = batch_size_invariant(adam, reference_batch_size=1, micro_batch_size=64 // passes)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            train(optimizer, [p], range(3), passes)
        ours = [warning for warning in told if "so short an average needs 16" in str(warning.message)]
        assert len(ours) == expected and all(warning.filename == __file__ for warning in ours)
