"""One trajectory of the invariant AdamW, whatever computes it: ranks, micro-batches, checkpointing, shards."""

from __future__ import annotations

import gc
import itertools

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from largebatch import optim
from largebatch.data.sampler import rank_share
from largebatch.distributed import Ranks
from largebatch.distributed.ddp import DataParallel
from largebatch.distributed.presence import check_statistics
from largebatch.models import GPT
from largebatch.moments import grad_sample_sq, is_shadow, track

UPDATES = 20
REFERENCE = 2
# Only the order of sums differs, by some 1e-16 an update; AdamW divides by roots of small squares.
EXACT = 1e-10


class Model(GPT):
    """A GPT whose blocks may be checkpointed; its first weight is its last one, too."""

    def __init__(self, use_reentrant=None, width=8):
        super().__init__(13, 6, n_layer=2, n_head=2, d_model=width)
        self.use_reentrant = use_reentrant

    def forward(self, tokens):
        if self.use_reentrant is None:
            return super().forward(tokens)
        features = self.wpe(self.wte(tokens))
        for block in self.blocks:
            features = checkpoint(block, features, use_reentrant=self.use_reentrant)
        return self.head(self.ln_f(features))


def build(use_reentrant=None, width=8):
    torch.manual_seed(0)
    model = Model(use_reentrant, width).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def batch(update, batch_size):
    generator = torch.Generator().manual_seed(update)
    tokens = torch.randint(0, 13, (batch_size, 7), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def loss_sum(model, inputs, targets):
    """Sum of the samples' mean losses."""
    return nn.functional.cross_entropy(model(inputs).transpose(1, 2), targets, reduction="none").mean(1).sum()


def pieces(split, batch_size, rank, world_size, accumulation):
    """Return this rank's micro-batches; under "idle" the last rank has none."""
    if split == "idle":
        share = rank_share(batch_size, rank, world_size - 1) if rank < world_size - 1 else slice(0, 0)
    else:
        share = rank_share(batch_size, rank, world_size)
    indices = torch.arange(share.start, share.stop).tensor_split(accumulation)
    return [piece for piece in indices if len(piece)] or [torch.arange(0)]


MODES = {"plain": None, "checkpoint": False}
BATCH_SIZES = {"even": 12, "uneven": 13, "idle": 13, "fewer samples than ranks": 3}


def trajectory(rank, world_size, mode="plain", split="uneven", accumulation=1, width=8, updates=UPDATES):
    """Return weights [updates, P] and statistics [updates, P] as the library trains, driven as the trainer drives it."""
    batch_size = BATCH_SIZES[split]
    model = track(build(MODES[mode], width))
    backend = DataParallel(Ranks(rank, rank, world_size), torch.device("cpu"), "fp64")
    called, optimizer = backend.prepare(
        model,
        lambda m: optim.AdamW(optim.param_groups(m, weight_decay=0.1), 1e-2, reference_batch_size=REFERENCE),
    )
    weights, statistics = [], []
    for update in range(updates):
        inputs, targets = batch(update, batch_size)
        mine = pieces(split, batch_size, rank, world_size, accumulation)
        for index, piece in enumerate(mine):
            with backend.accumulate(sync=index == len(mine) - 1):
                if len(piece):
                    loss = loss_sum(called, inputs[piece], targets[piece])
                else:  # no sample, but a part in the reduction
                    loss = loss_sum(called, inputs[:1], targets[:1]) * 0.0
                backend.backward(loss / batch_size)
        optimizer.set_batch(batch_size, batch_size, world_size)
        if update == 0:
            check_statistics(model)
        statistics.append(flat(grad_sample_sq(model, batch_size, world_size)))
        backend.step(optimizer)
        weights.append(flat({n: p for n, p in model.named_parameters() if not is_shadow(p)}))
    backend.close()
    del called, optimizer
    gc.collect()
    return torch.stack(weights), torch.stack(statistics)


def flat(named):
    return torch.cat([named[name].detach().flatten() for name in sorted(named)]).clone()


_references: dict = {}


def reference(split, width=8, updates=UPDATES):
    """The same in one process, in one pass, cached."""
    key = BATCH_SIZES[split], width, updates
    if key not in _references:
        _references[key] = trajectory(0, 1, "plain", "uneven" if split == "idle" else split, 1, width, updates)
    return _references[key]


def errors(result, split, width=8, updates=UPDATES):
    """Return the largest differences of weights and statistics from `reference`, relative to each one's largest entry."""
    return [
        float((ours - theirs).abs().max() / theirs.abs().max())
        for ours, theirs in zip(result, reference(split, width, updates), strict=True)
    ]


def assert_same(result, split, case, **options):
    worst = errors(result, split, **options)
    assert max(worst) <= EXACT, f"{case}: weights {worst[0]:.1e}, statistics {worst[1]:.1e}"


def cases_on_rank(rank, world_size, cases):
    return [trajectory(rank, world_size, *case) for case in cases]


def test_the_reference_is_the_formula(split="uneven"):
    """AdamW over a loop of samples, written out."""
    batch_size = BATCH_SIZES[split]
    weights, statistics = reference(split)
    model = build()
    params = dict(sorted(model.named_parameters()))
    mean, second = ({n: torch.zeros_like(p) for n, p in params.items()} for _ in range(2))
    for update in range(UPDATES):
        inputs, targets = batch(update, batch_size)
        rows = [
            torch.autograd.grad(loss_sum(model, x[None], y[None]), list(params.values()))
            for x, y in zip(inputs, targets, strict=True)
        ]
        with torch.no_grad():
            squares = {}
            for (name, p), *grads in zip(params.items(), *rows, strict=True):
                g = torch.stack(grads)
                ghat, squares[name] = g.mean(0), g.square().mean(0)
                variance = batch_size / (batch_size - 1) * (squares[name] - ghat**2)
                estimate = ghat**2 + variance * (1 / REFERENCE - 1 / batch_size)
                if p.dim() > 1 and name != "wpe.weight":
                    p.mul_(1 - 1e-2 * 0.1)
                t = update + 1
                second[name].lerp_(estimate, 0.001)
                newer = (second[name] / (1 - 0.999**t)).sqrt() + 1e-8
                mean[name].lerp_(ghat, 0.1)  # of 0.999 it is not carried
                p.sub_(1e-2 * (mean[name] / (1 - 0.9**t)) / newer)
        torch.testing.assert_close(statistics[update], flat(squares), rtol=EXACT, atol=1e-13)
        torch.testing.assert_close(weights[update], flat(params), rtol=EXACT, atol=1e-11)


# Every number of ranks and every mode once; the slow test takes the combinations.
FEW = {
    1: [("checkpoint", "uneven", 2), ("plain", "even", 5)],
    2: [("plain", "even", 1)],
    3: [("checkpoint", "idle", 2)],
    4: [("plain", "uneven", 2)],
}


@pytest.mark.parametrize("world_size", FEW)
def test_twenty_updates_of_adamw(world_size, rank_pool):
    assert_all_same(world_size, FEW[world_size], rank_pool)


def assert_all_same(world_size, cases, rank_pool):
    ranks = [cases_on_rank(0, 1, cases)] if world_size == 1 else rank_pool(world_size, cases_on_rank, cases)
    for results in ranks:
        for result, case in zip(results, cases, strict=True):
            assert_same(result, case[1], (world_size, *case))


@pytest.mark.slow
@pytest.mark.parametrize("split", BATCH_SIZES)
@pytest.mark.parametrize("mode", ["plain", "checkpoint"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_twenty_updates_of_adamw_in_full(world_size, mode, split, rank_pool):
    if world_size == 1 and split not in ("even", "uneven"):
        pytest.skip("one process is never idle")
    for accumulation in (1, 2, 5):
        assert_all_same(world_size, [(mode, split, accumulation)], rank_pool)


@pytest.mark.slow
def test_several_buckets(rank_pool):
    """A model of 2.6 MB with its shadows, where the first bucket of the reduction takes one."""
    options = {"width": 64, "updates": 5}
    for results in rank_pool(2, cases_on_rank, [("plain", "uneven", 2, *options.values())]):
        assert_same(results[0], "uneven", "plain", **options)


def shards(rank, world_size, use_reentrant, accumulation, split):
    """Return largest relative errors of gradients and statistics that FSDP2 reduced, against one process."""
    batch_size = BATCH_SIZES[split]
    inputs, targets = batch(0, batch_size)
    whole = track(build())
    (loss_sum(whole, inputs, targets) / batch_size).backward()
    model = track(build(use_reentrant))
    mesh = init_device_mesh("cpu", (world_size,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    mine = pieces(split, batch_size, rank, world_size, accumulation)
    for index in range(accumulation):  # every rank gathers as often as the others
        piece = mine[index] if index < len(mine) else torch.arange(0)
        model.set_requires_gradient_sync(index == accumulation - 1)
        rows = piece if len(piece) else slice(0, 1)
        loss = loss_sum(model, inputs[rows], targets[rows]) * (1.0 if len(piece) else 0.0)
        (loss * world_size / batch_size).backward()
    expected = grad_sample_sq(whole, batch_size)
    statistic = grad_sample_sq(model, batch_size, world_size)
    assert statistic.keys() == expected.keys()
    worst = [0.0, 0.0]
    for name, squares in expected.items():
        grad = model.get_parameter(name).grad.full_tensor()
        # Of gradients that cancel, such as those of an attention's key biases, the summands are the yardstick.
        scale = squares.max().sqrt()
        worst[0] = max(worst[0], float((grad - whole.get_parameter(name).grad).abs().max() / scale))
        worst[1] = max(worst[1], float((statistic[name].full_tensor() - squares).abs().max() / squares.max()))
    return worst


SHARDED = [(2, False, 2, "idle"), (3, None, 2, "uneven")]
ALL_SHARDED = itertools.product((2, 3, 4), (None, False), (1, 2), ("even", "uneven", "idle"))


@pytest.mark.parametrize(
    ("world_size", "use_reentrant", "accumulation", "split"),
    [pytest.param(*case, marks=() if case in SHARDED else pytest.mark.slow) for case in ALL_SHARDED],
)
def test_shards_of_fsdp2(world_size, use_reentrant, accumulation, split, rank_pool):
    """Neither 13 rows nor 8 can be cut into 2 and 3 parts alike."""
    for worst in rank_pool(world_size, shards, use_reentrant, accumulation, split):
        assert max(worst) <= 1e-12, f"gradient {worst[0]:.1e}, statistic {worst[1]:.1e}"
