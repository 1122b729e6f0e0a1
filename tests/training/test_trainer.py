"""The trainer: N ranks equal one, accumulation equals one pass, and a step equals one written by hand."""

import json
import math

import pytest
import torch
from runs import assert_same_curve, digits, rows_of

from largebatch.checkpoint.folder import CheckpointFolder, read_state
from largebatch.distributed import Ranks
from largebatch.distributed.state import read_tensors, tensor_metadata
from largebatch.planner.derive import second_moment
from largebatch.planner.resolve import resolve
from largebatch.training.resume import find_checkpoint
from largebatch.training.run import build_model, train


def _train_on_rank(rank, world_size, run, folder):
    return rows_of(run, folder, Ranks(rank, rank, world_size))


ADAMW, RMSPROP, ADAGRAD = (
    {"optimizer.name": name, "optimizer.lr": 1e-3, "optimizer.second_moment": "sample"}
    for name in ("adamw", "rmsprop", "adagrad")
)
MODELS = {
    "mlp": {},
    "cnn": {"model.name": "cnn", "model.channels": [8, 8], "batch.size": 192, "schedule.epochs": 1.0},
    # Statistics over 16 samples: groups stay together on any number of ranks and in any micro-batch.
    "cnn with batch norm": {
        "model.name": "cnn",
        "model.channels": [8, 8],
        "model.norm": "batch",
        "model.norm_group_size": 16,
        "batch.size": 192,
        "schedule.epochs": 1.0,
    },
    "growing batch": {"schedule.name": "step", "schedule.milestones_epochs": [0.6, 1.2], "schedule.factor": 0.4,
                      "schedule.epochs": 2, "schedule.realize": "batch", "batch.size": 60},
    "adamw, squares of samples": ADAMW | {"schedule.epochs": 2.5},
    "rmsprop, squares of samples, clipped": RMSPROP | {"optimizer.max_grad_norm": 0.5},
    "cnn, adagrad, squares of samples": ADAGRAD | {"model.name": "cnn", "model.channels": [8, 8], "schedule.epochs": 1.0},
    "epoch cut, clipped": {"batch.at_epoch_end": "cut", "optimizer.max_grad_norm": 0.5, "schedule.epochs": 2},
}  # fmt: skip


# They take the paths of others: sgd, convolutions, squares of samples.
SLOW = ("mlp", "cnn", "cnn, adagrad, squares of samples")


@pytest.mark.parametrize("model", [pytest.param(m, marks=[pytest.mark.slow] * (m in SLOW)) for m in MODELS])
def test_ranks_and_micro_batches_do_not_change_the_run(model, rank_pool, tmp_path):
    """The same curve to rounding in float64 for 1 to 4 ranks and micro-batches of 16, 48 and a whole share."""
    expected = rows_of(digits(**MODELS[model]), tmp_path / "one")
    assert len(expected[0]) > 3 and len(expected[1]) >= 2
    for world_size, micro in ((1, 16), (1, 48), (2, None), (3, 16), (4, 48)):
        flags = MODELS[model] | ({"batch.micro_size": micro} if micro else {})
        folder = tmp_path / f"{world_size}-{micro}"
        if world_size == 1:
            ours = rows_of(digits(**flags), folder)
        else:
            ours = rank_pool(world_size, _train_on_rank, digits(**flags), folder)[0]
        # Only the order of sums differs; float64 rounding grows over some ten updates.
        assert_same_curve(ours, expected, 1e-10)


# 14 updates of 192 samples, which 1 to 4 ranks cut into the same micro-batches of 16.
SAME_UNITS = {"optimizer.name": "adamw", "optimizer.lr": 1e-3, "optimizer.weight_decay": 0.1, "batch.size": 192,
              "batch.reference_size": 32, "batch.micro_size": 16, "schedule.name": "cosine", "schedule.epochs": 14 * 192 / 1438}  # fmt: skip


@pytest.mark.parametrize(
    "flags",
    [
        {"optimizer.max_grad_norm": 0.5},
        {"backend.squares_every": 3, "optimizer.max_grad_norm": 0.5},
        {"optimizer.name": "rmsprop", "optimizer.lr": 1e-3, "optimizer.centered": True, "noise.measure": True},
        {"optimizer.name": "lamb", "optimizer.lr": 1e-3, "schedule.name": "step", "schedule.epochs": 16 * 192 / 1438,
         "schedule.milestones_epochs": [8 * 192 / 1438], "schedule.factor": 0.5, "schedule.realize": "batch"},
    ],
    ids=["adamw, clipped", "variance of every third update", "rmsprop, with the noise", "lamb, growing"],
)  # fmt: skip
def test_ranks_do_not_change_a_run_with_the_same_micro_batches(flags, rank_pool, tmp_path):
    run = digits(**SAME_UNITS | flags)
    expected = rows_of(run, tmp_path / "one")
    assert second_moment(run) == "micro_batch" and len(expected[0]) >= 12
    for world_size in (2, 4):
        ours = rank_pool(world_size, _train_on_rank, run, tmp_path / str(world_size))[0]
        assert_same_curve(ours, expected, 1e-10)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_rank_without_samples_takes_part(optimizer, rank_pool, tmp_path):
    """The run's last batch has fewer samples than there are ranks."""
    flags = {"optimizer.name": optimizer, "optimizer.lr": 1e-3, "schedule.epochs": 1.0, "evaluate.every_epochs": 1.0}
    if optimizer == "adamw":
        flags["optimizer.second_moment"] = "sample"  # ranks are micro-batches, too
    run = digits(**flags, **{"batch.size": 205})  # 1438 = 7 * 205 + 3
    expected = rows_of(run, tmp_path / "one")
    assert expected[0][-1]["batch_size"] == 3
    assert_same_curve(rank_pool(4, _train_on_rank, run, tmp_path / "four")[0], expected, 1e-10)


@pytest.mark.parametrize("flags", [{}, {"backend.squares_dtype": "bfloat16"}, {"backend.squares_every": 4}])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_every_rank_ends_with_the_same_weights(optimizer, flags, rank_pool, tmp_path):
    flags = flags | {"precision": "fp32", "optimizer.name": optimizer, "optimizer.lr": 1e-3}
    first, second = rank_pool(2, _final_weights, digits(**flags), tmp_path / "run")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_squares_in_bfloat16_move_the_weights_by_their_rounding(rank_pool, tmp_path):
    flags = {"precision": "fp32", "optimizer.name": "adamw", "optimizer.lr": 1e-3}
    exact, rough = (
        rank_pool(2, _final_weights, digits(**flags, **{"backend.squares_dtype": dtype}), tmp_path / "run")[0]
        for dtype in ("float32", "bfloat16")
    )
    start = build_model(digits(**flags), digits().data.load(0).task).state_dict()
    # bfloat16 keeps 8 bits, a relative error of at most 2^-8 in a square, half of that in its root; an error of the squares
    # is multiplied by (kappa-1)/(n-1), here of 200 samples in 2 micro-batches against a reference of 32.
    for name, value in exact.items():
        moved = (value - start[name]).norm()
        assert (rough[name] - value).norm() < 2**-8 * 5.25 * moved


def _final_weights(rank, world_size, run, folder):
    from largebatch.distributed import create_backend
    from largebatch.reporting.loggers import Loggers
    from largebatch.training.trainer import Trainer

    source = run.data.load(run.seed)
    model = build_model(run, source.task)
    resolved = resolve(run, len(source.train), world_size)
    backend = create_backend(run.backend, run.precision, Ranks(rank, rank, world_size))
    Trainer(resolved, source, model, backend, logger=Loggers()).train()
    backend.close()
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_the_run_is_the_loop_written_by_hand(tmp_path):
    """Whole trajectory against a plain torch loop: order of samples, mean loss, learning rate, weight decay groups."""
    import numpy as np

    run = digits(**{"optimizer.weight_decay": 0.01, "optimizer.nesterov": True})
    updates, evaluations = rows_of(run, tmp_path / "run")

    source = run.data.load(0)
    model = build_model(run, source.task).double()
    matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) == wide] for wide in (True, False))
    optimizer = torch.optim.SGD(
        [{"params": matrices, "weight_decay": 0.01}, {"params": vectors}], 0.1, momentum=0.9, nesterov=True
    )
    inputs, targets = source.train.inputs.double(), source.train.targets
    num, size, total = len(inputs), 200, 1.5 * len(inputs)
    order = np.concatenate([np.random.default_rng([0, epoch]).permutation(num) for epoch in range(2)])
    seen = 0
    for row in updates:
        chosen = order[seen : seen + row["batch_size"]]
        lr = 0.02 * len(chosen) / 32 * 0.5 * (1 + math.cos(math.pi * seen / total))
        if seen < num / 2:
            lr *= 32 / size + (1 - 32 / size) * seen / (num / 2)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = torch.nn.functional.cross_entropy(model(inputs[chosen]), targets[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-10)
        assert row["lr"] == pytest.approx(lr, rel=1e-12)
        seen += len(chosen)
    assert seen == total
    with torch.no_grad():
        outputs = model(source.val.inputs.double())
    assert evaluations[-1]["val_loss"] == pytest.approx(
        torch.nn.functional.cross_entropy(outputs, source.val.targets).item(), rel=1e-10
    )
    assert evaluations[-1]["val_accuracy"] == pytest.approx(
        (outputs.argmax(1) == source.val.targets).double().mean().item()
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_lower_precision_follows_float64(precision, tmp_path):
    exact, _ = rows_of(digits(), tmp_path / "exact")
    rough, _ = rows_of(digits(precision=precision), tmp_path / "rough")
    # bf16 keeps 8 bits of each product's factors; the loss averages hundreds of them.
    tolerance = {"fp32": 1e-4, "bf16": 2e-2}[precision]
    for a, b in zip(rough, exact, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=tolerance)


def test_fp16_scales_the_loss_and_skips_overflows(tmp_path):
    updates, evaluations = rows_of(digits(precision="fp16"), tmp_path / "run")
    exact, _ = rows_of(digits(), tmp_path / "exact")
    assert not math.isfinite(updates[0]["grad_norm"]) or updates[0]["grad_norm"] > 0
    assert evaluations[-1]["val_loss"] == pytest.approx(exact[-1]["loss"], rel=0.5)


def test_workers_change_nothing(tmp_path):
    expected = rows_of(digits(), tmp_path / "one")
    ours = rows_of(digits(**{"loader.num_workers": 2, "batch.micro_size": 64}), tmp_path / "two")
    assert_same_curve(ours, expected, 1e-10)


@pytest.mark.filterwarnings("ignore:overflow encountered")  # the picture of such a loss
def test_a_non_finite_gradient_stops_and_keeps_the_last_good_state(tmp_path):
    flags = {"optimizer.lr": 1e12, "precision": "fp32", "warmup.name": "none", "scaling.rule": "none"}
    run = digits(**flags)
    result = train(run, tmp_path / "run", ranks=Ranks())
    summary = result.summary
    assert summary.status == "diverged"
    assert f"update {summary.updates + 1}" in summary.message and "rank 0" in summary.message
    (path,) = CheckpointFolder(tmp_path / "run" / "checkpoints").saved()
    assert str(path) in summary.message and read_state(path)["progress"]["step"] == summary.updates
    tensors = read_tensors(path, tensor_metadata(path))
    assert all(value.isfinite().all() for name, value in tensors.items() if name.startswith(("model.", "optimizer.")))
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "diverged"
    assert not (tmp_path / "run" / "model.safetensors").exists()


def poisoned(task):
    """A model whose loss is NaN on rank 1 at the third update."""
    return _Poisoned(task.num_outputs)


class _Poisoned(torch.nn.Module):
    def __init__(self, num_outputs):
        super().__init__()
        self.linear = torch.nn.Linear(64, num_outputs)
        self.calls = 0

    def forward(self, inputs):
        import torch.distributed as dist

        self.calls += self.training
        outputs = self.linear(inputs.flatten(1))
        return outputs * math.nan if self.calls == 3 and dist.is_initialized() and dist.get_rank() == 1 else outputs


def noisy(task):
    """A model that keeps the dropout mask it drew first."""
    return _Noisy(task.num_outputs)


class _Noisy(torch.nn.Module):
    mask = None

    def __init__(self, num_outputs):
        super().__init__()
        self.linear = torch.nn.Linear(64, num_outputs)

    def forward(self, inputs):
        kept = torch.nn.functional.dropout(torch.ones_like(inputs), training=self.training)
        if self.training and _Noisy.mask is None:
            _Noisy.mask = kept.flatten()[:512].clone()
        return self.linear((inputs * kept).flatten(1))


def _first_mask(rank, world_size):
    _Noisy.mask = None
    train(digits(**{"model.name": "test_trainer:noisy"}), None, ranks=Ranks(rank, rank, world_size))
    return _Noisy.mask


def test_ranks_draw_other_dropout_masks(rank_pool):
    first, second = rank_pool(2, _first_mask)
    assert not torch.equal(first, second)


def _train_poisoned(rank, world_size, folder):
    run = digits(**{"model.name": "test_trainer:poisoned"})
    return train(run, folder, ranks=Ranks(rank, rank, world_size)).summary


def test_every_rank_stops_at_one_ranks_nan(rank_pool, tmp_path):
    for summary in rank_pool(2, _train_poisoned, tmp_path / "run"):
        assert summary.status == "diverged" and summary.updates == 2
        assert "update 3" in summary.message and "not finite on rank 1" in summary.message


def test_a_checkpoint_restores_model_and_optimizer(tmp_path):
    from largebatch.distributed import create_backend
    from largebatch.reporting.loggers import Loggers
    from largebatch.training.trainer import Trainer

    run = digits(**{"optimizer.name": "adamw", "optimizer.lr": 1e-3})

    def trainer(found=None):
        source = run.data.load(run.seed)
        resolved = resolve(run, len(source.train))
        backend = create_backend(run.backend, run.precision, Ranks())
        return Trainer(
            resolved, source, build_model(run, source.task), backend, logger=Loggers(), folder=tmp_path, found=found
        )

    trained = trainer()
    trained.train()
    found, _ = find_checkpoint("auto", tmp_path)
    fresh = trainer(found)
    assert fresh.progress.step == trained.progress.step and fresh.progress.samples_seen == trained.progress.samples_seen
    for (name, a), b in zip(
        trained.bare_model.state_dict().items(), fresh.bare_model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b)
        theirs, ours = (t.optimizer.state[t.bare_model.get_parameter(name)]["exp_avg_sq"] for t in (trained, fresh))
        assert torch.equal(theirs, ours)


def test_an_interrupted_run_leaves_its_summary(tmp_path, monkeypatch):
    from largebatch.training.trainer import Trainer

    evaluate = Trainer.evaluate

    def interrupted(self):
        if self.progress.step > 5:
            raise KeyboardInterrupt
        return evaluate(self)

    monkeypatch.setattr(Trainer, "evaluate", interrupted)
    result = train(digits(), tmp_path / "run", ranks=Ranks())
    assert result.summary.status == "interrupted"
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["updates"] == result.summary.updates > 5
    assert (tmp_path / "run" / "curve.png").stat().st_size > 10_000
