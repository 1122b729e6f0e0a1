"""The largest curvature: against dense Hessians in float64, between ranks, and as a command."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console
from runs import digits, rows_of
from scipy.sparse.linalg import eigsh
from torch import nn

from largebatch.cli import main
from largebatch.data.sampler import global_batch
from largebatch.distributed import Ranks
from largebatch.distributed.state import read_tensors
from largebatch.errors import UserError
from largebatch.models.gpt import GPT
from largebatch.noise.curvature import hessian_product, largest_eigenvalue, noise_of_units
from largebatch.studies.limit import UNITS, measure_limit
from largebatch.task import Task
from largebatch.training.run import build_model

CONSOLE = Console(quiet=True)


def symmetric(values):
    """Return a matrix with these eigenvalues."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))[0]
    return basis @ torch.diag(torch.as_tensor(values, dtype=torch.float64)) @ basis.T


@pytest.mark.parametrize(("most_vectors", "dtype"), [(24, torch.float64), (6, torch.float64), (24, torch.float32)])
def test_lanczos_finds_the_algebraically_largest_eigenvalue(most_vectors, dtype):
    """Beside a negative one of larger magnitude, with restarts, and in float32."""
    values = torch.linspace(-1.0, 1.0, 150, dtype=torch.float64) ** 3
    values[0], values[-1] = -9.0, 2.5
    matrix = symmetric(values).to(dtype)
    found = largest_eigenvalue(
        lambda v: matrix @ v, torch.randn(150, dtype=dtype), tolerance=1e-4, most_vectors=most_vectors
    )
    assert found.value == pytest.approx(2.5, rel=1e-6)
    assert float((matrix @ found.vector - found.value * found.vector).norm()) == pytest.approx(
        found.residual, rel=0.1, abs=1e-5
    )
    assert found.residual <= 1e-4 * 2.5 and found.products < 100


def test_lanczos_ends_where_the_space_does():
    matrix = symmetric([1.0, -2.0, 0.5])
    found = largest_eigenvalue(lambda v: matrix @ v, torch.ones(3, dtype=torch.float64), tolerance=0.0)
    assert found.value == pytest.approx(1.0) and found.products <= 3
    assert largest_eigenvalue(lambda v: 0.0 * v, torch.ones(4)).value == 0.0


def networks():
    torch.manual_seed(0)
    return {
        "mlp": (
            nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)),
            torch.randn(20, 6),
            torch.randint(3, (20,)),
        ),
        "conv": (
            nn.Sequential(nn.Conv2d(1, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(16, 3)),
            torch.randn(20, 1, 4, 4),
            torch.randint(3, (20,)),
        ),
        "gpt": (GPT(7, 5, 1, 2, 4, 0.0, True), torch.randint(7, (6, 5)), torch.randint(7, (6, 5))),
    }


def dense(loss_of, model):
    """Return the Hessian of a loss in all parameters, row by row."""
    params = [p for p in model.parameters() if p.requires_grad]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        grads = torch.autograd.grad(loss_of(model), params, create_graph=True)
        flat = torch.cat([g.reshape(-1) for g in grads])
        rows = [torch.autograd.grad(g, params, retain_graph=True, materialize_grads=True) for g in flat]
    return torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])


@pytest.mark.parametrize("name", ["mlp", "conv", "gpt"])
def test_the_largest_curvature_is_that_of_the_dense_hessian(name):
    model, inputs, targets = networks()[name]
    model.double()
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    params, task = list(model.parameters()), Task("classification" if targets.ndim == 1 else "language_modeling", (), 7)

    def loss_of(model):
        return task.losses(model(inputs), targets).mean()

    hessian = dense(loss_of, model)

    def product(vector):
        parts = [v.view_as(p) for v, p in zip(vector.split([p.numel() for p in params]), params, strict=True)]
        with torch.enable_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return torch.cat([part.reshape(-1) for part in hessian_product(loss_of(model), params, parts)])

    vector = torch.randn(len(hessian), dtype=torch.float64)
    torch.testing.assert_close(product(vector), hessian @ vector, rtol=1e-10, atol=1e-12)
    exact = float(torch.linalg.eigvalsh(hessian)[-1])
    assert largest_eigenvalue(product, vector).value == pytest.approx(exact, rel=0.01)


@pytest.mark.filterwarnings("ignore")  # of these libraries
@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_the_largest_curvature_is_that_of_other_libraries(name):
    """Products by curvlinops and the eigenvalue by ARPACK of them; power iteration by PyHessian, in float32."""
    curvlinops = pytest.importorskip("curvlinops", reason="needs curvlinops-for-pytorch")
    pyhessian = pytest.importorskip("pyhessian", reason="needs pyhessian")
    model, inputs, targets = networks()[name]
    loss = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    for _ in range(20):  # until the eigenvalue of largest magnitude is positive
        optimizer.zero_grad()
        loss(model(inputs), targets).backward()
        optimizer.step()
    params = list(model.parameters())

    def product(vector):
        parts = [v.view_as(p) for v, p in zip(vector.split([p.numel() for p in params]), params, strict=True)]
        with torch.enable_grad():
            return torch.cat(
                [part.reshape(-1) for part in hessian_product(loss(model(inputs), targets), params, parts)]
            )

    start = torch.randn(sum(p.numel() for p in params))
    by_power = pyhessian.hessian(model, loss, data=(inputs, targets), cuda=False).eigenvalues(maxIter=500, tol=1e-6)[0][
        0
    ]
    assert largest_eigenvalue(product, start, tolerance=1e-4).value == pytest.approx(by_power, rel=0.01)
    model.double()
    inputs, params, start = inputs.double(), list(model.parameters()), start.double()
    operator = curvlinops.HessianLinearOperator(model, loss, params, [(inputs, targets)])
    torch.testing.assert_close(product(start), operator @ start, rtol=1e-10, atol=1e-12)
    by_arpack = float(eigsh(operator.to_scipy(), k=1, which="LA", return_eigenvectors=False)[0])
    assert largest_eigenvalue(product, start).value == pytest.approx(by_arpack, rel=0.01)


def test_what_has_no_second_derivative_is_named():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.exp()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, gradient):
            return gradient

    weight = nn.Parameter(torch.ones(3))
    with pytest.raises(UserError, match=r"no second derivative .*once_differentiable"):
        hessian_product(Once.apply(weight).square().sum(), [weight], [torch.ones(3)])
    linear = hessian_product(weight.sum(), [weight], [torch.ones(3)])
    assert torch.equal(linear[0], torch.zeros(3))


def test_the_noise_of_units_is_that_of_all_pairs_with_a_jackknifes_band():
    torch.manual_seed(0)
    grads = 1.0 + torch.randn(16, 5, dtype=torch.float64)
    found = noise_of_units(grads.square().sum(1), grads @ grads.sum(0), unit_size=4.0)

    def estimates(units):
        pairs = units @ units.T
        signal = float((pairs.sum() - pairs.trace()) / (len(units) * (len(units) - 1)))
        return 4.0 * float(units.var(dim=0).sum()), signal

    trace, signal = estimates(grads)
    assert (found.trace, found.signal) == pytest.approx((trace, signal), rel=1e-12)
    others = torch.tensor([estimates(torch.cat([grads[:i], grads[i + 1 :]])) for i in range(16)])
    assert found.noise_scale == pytest.approx(trace / signal) and found.low < found.noise_scale < found.high
    # Fieller's ends: where trace - rho signal is 2.947 of its own deviations off 0.
    for rho in (found.low, found.high):
        deviation = float(((others[:, 0] - rho * others[:, 1]).var() * 15 * 15 / 16).sqrt())
        assert abs(trace - rho * signal) / deviation == pytest.approx(2.947, rel=1e-3)


OPTIMIZERS = {
    "sgd": {"optimizer.name": "sgd", "optimizer.lr": 0.02, "optimizer.momentum": 0.9},
    "nesterov": {"optimizer.name": "sgd", "optimizer.lr": 0.02, "optimizer.momentum": 0.9, "optimizer.nesterov": True},
    "adamw": {"optimizer.name": "adamw", "optimizer.lr": 3e-3, "optimizer.weight_decay": 0.1},
    "rmsprop": {"optimizer.name": "rmsprop", "optimizer.lr": 1e-3, "optimizer.momentum": 0.5},
}
SMALL = {"model.name": "mlp", "model.hidden": [3], "schedule.name": "constant", "schedule.epochs": 1.0, "warmup.name": "none", "warmup.epochs": 0}  # fmt: skip


def samples_at(config, source, at, num_samples):
    keys = global_batch(config.seed, len(source.train), at, num_samples)
    inputs, targets = source.train.__getitems__(keys)
    size = num_samples // UNITS
    return inputs.double().split(size), targets.split(size)


def loss_of_units(inputs, targets, chosen):
    return lambda model: nn.functional.cross_entropy(
        model(torch.cat([inputs[n] for n in chosen])), torch.cat([targets[n] for n in chosen])
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_command_measures_what_a_dense_hessian_says(name, tmp_path):
    """At a checkpoint of a run above its reference, with the denominators and the limit written out for each optimizer."""
    config = digits(**SMALL, **OPTIMIZERS[name])
    rows_of(config, tmp_path / "run")
    checkpoint = next((tmp_path / "run" / "checkpoints").glob("samples-*"))
    (place,) = measure_limit(config, checkpoint, 320, CONSOLE, Ranks())

    source = config.data.load(config.seed)
    model = build_model(config, source.task).double()
    names = [f"model.{n}" for n, _ in model.named_parameters()]
    saved = read_tensors(checkpoint, names)
    model.load_state_dict({n.removeprefix("model."): saved[n] for n in names})
    inputs, targets = samples_at(config, source, 1438, 320)
    units = []
    for x, y in zip(inputs, targets, strict=True):
        grads = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), list(model.parameters()))
        units.append(torch.cat([g.flatten() for g in grads]))
    stacked = torch.stack(units)
    kappa, mean, variance = 200 / 32, stacked.mean(0), stacked.var(0) * 10
    at_reference = mean**2 + variance * (1 / 32 - 1 / 320)

    def slot(name):
        found = read_tensors(checkpoint, [f"optimizer.{n}.{name}" for n, _ in model.named_parameters()])
        return torch.cat([value.flatten() for value in found.values()])

    divisor, rate, limit = torch.ones_like(mean), 0.02 * kappa, 2 * 1.9
    if name == "nesterov":  # 2 (1+b)/(1+2b)
        limit /= 2.8
    if name == "adamw":
        beta2 = 0.999**kappa
        unbiased = 1 - float(slot("second_moment_count")[0]) * beta2
        divisor = ((beta2 * slot("exp_avg_sq") + (1 - beta2) * at_reference) / unbiased).sqrt() + 1e-8
        rate = 3e-3 * kappa * 0.1
    if name == "rmsprop":
        alpha = 0.99**kappa
        divisor = (alpha * slot("exp_avg_sq") + (1 - alpha) * at_reference).sqrt() + 1e-8
        rate, limit = 1e-3 * kappa, 2 * 1.5
    even, odd = (
        dense(loss_of_units(inputs, targets, chosen), model) / (divisor.sqrt()[:, None] * divisor.sqrt()[None])
        for chosen in (range(0, UNITS, 2), range(1, UNITS, 2))
    )
    values, vectors = torch.linalg.eigh(even)
    assert place.eigenvalue[1] == pytest.approx(float(values[-1]), rel=0.02)  # its residual is counted in
    elsewhere = float(vectors[:, -1] @ odd @ vectors[:, -1])
    assert place.eigenvalue[0] == pytest.approx(elsewhere, rel=0.15)  # the vector is less exact than its value
    assert place.shares[2] == pytest.approx(rate * place.eigenvalue[1] / limit, rel=1e-9)
    assert place.stable[0] == pytest.approx(200 / place.shares[2])
    assert place.noise.trace == pytest.approx(float(variance.sum()), rel=1e-9)


def measure_on_rank(rank, world_size, config, path, samples):
    (place,) = measure_limit(config, path, samples, CONSOLE, Ranks(rank, rank, world_size))
    return place


@pytest.mark.parametrize("model", [pytest.param("cnn", marks=pytest.mark.slow), "mlp"])
def test_ranks_and_passes_change_nothing(model, rank_pool, tmp_path):
    """Nor does it matter which engine the checkpoint is to go on with; batch norms keep their groups."""
    flags = SMALL | OPTIMIZERS["adamw"]
    if model == "cnn":
        flags |= {"model.name": "cnn", "model.channels": [2, 2], "model.norm": "batch", "model.norm_group_size": 4}
        flags["batch.size"] = 192
        del flags["model.hidden"]
    config = digits(**flags)
    expected = measure_on_rank(0, 1, config, None, 256)
    for world_size, others in ((2, {"batch.micro_size": 4}), (4, {"backend.name": "fsdp"})):
        for found in rank_pool(world_size, measure_on_rank, digits(**flags | others), None, 256):
            assert found.eigenvalue == pytest.approx(expected.eigenvalue, rel=1e-8)
            assert found.shares == pytest.approx(expected.shares, rel=1e-8)
            assert vars(found.noise) == pytest.approx(vars(expected.noise), rel=1e-8)


def test_the_command_prints_a_table_a_picture_and_a_sentence(tmp_path, capsys):
    config = digits(**SMALL, **OPTIMIZERS["adamw"], **{"checkpoint.every_epochs": 0.3, "checkpoint.keep_last": 3})
    rows_of(config, tmp_path / "run")
    path = str(tmp_path / "run" / "config.yaml")
    damaged = next((tmp_path / "run" / "checkpoints").glob("samples-*"))
    next(damaged.glob("*.distcp")).write_bytes(b"")
    assert main(["limit", path, "--checkpoint", str(tmp_path / "run"), "--samples", "64"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "stable to a batch of" in printed and f"{damaged.name} is left out" in printed
    assert "this run would hold up to a batch of about" in printed or "stable at any batch size" in printed
    assert (tmp_path / "run" / "limit.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("flags", "words", "message"),
    [
        (["--optimizer.name", "lamb", "--optimizer.lr", "0.001"], [], "optimizer.name: expected sgd, rmsprop, adam or adamw, got lamb"),
        (["--scaling.rule", "adascale"], [], "scaling.rule: adascale measures its rate"),
        ([], ["--samples", "31"], "--samples: expected 32 or more .*got 31"),
        ([], ["--samples", "0"], "--samples: expected 32 or more"),
        ([], ["--checkpoint", "nowhere"], "--checkpoint: nowhere has none to measure at"),
        ([], ["--checkpoint", "x/samples-000000000007"], "--checkpoint: .*does not exist"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_one_line(flags, words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(digits().to_yaml())
    assert main(["limit", "run.yaml", *words, *flags]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert pytest.importorskip("re").search(message, error)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    rows_of(digits(**SMALL), tmp_path / "run")
    with pytest.raises(UserError, match=r"is of another run: model.hidden"):
        measure_limit(digits(**SMALL | {"model.hidden": [7]}), tmp_path / "run", 64, CONSOLE, Ranks())
