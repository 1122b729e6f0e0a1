"""Everything without a rule: recurrent layers, unknown operations, whole modules named by the user.

Each sample's gradient is a vector-Jacobian product of its own, of the operation run again on the sample alone. If that
does not reproduce the sample's output, because the operation mixes samples or draws random numbers, the operation is
run again on the whole batch, with the generator set back, and differentiated once for each sample's rows of the
output. Exact either way, and slow.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from largebatch.moments import layout
from largebatch.moments.scope import WAY_OUT, Scope, notes, state
from largebatch.moments.tap import CHUNK_ELEMENTS, Operand, Operation, _deliver, refuse_double_backward, statistic_dtype
from largebatch.section import UserError

_VF = torch._C._VariableFunctions
_RECURRENT = {getattr(_VF, name) for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")}
_CELLS = {getattr(_VF, name) for name in ("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")}
_warned: set[str] = set()


class Replay(Operation):
    """An operation that is run again, sample by sample.

    Attributes:
        function: takes the flat list of arguments, returns the flat list of tensor results.
        leaves: the arguments, None in place of the saved tensors.
        where: positions of the saved tensors in `leaves`: the operands first, then the other tensors.
        dims: for each position in `leaves`, the dimension of its samples; None for what every sample shares.
        output_dims: the same for each result.
        random_state: of the generators before the operation, None if it drew nothing.
    """

    def __init__(
        self,
        num_samples: int,
        function: Callable[[list[Any]], list[Tensor]],
        leaves: list[Any],
        where: list[int],
        dims: list[int | None],
        output_dims: list[int],
        random_state: tuple[Tensor, Tensor | None] | None,
    ):
        super().__init__(num_samples, ())
        self.function = function
        self.leaves = leaves
        self.where = where
        self.dims = dims
        self.output_dims = output_dims
        self.random_state = random_state
        self._cache: dict[int, list[Tensor]] = {}
        self._whole: tuple[list[Tensor], list[Tensor]] | None = None

    def forget(self) -> None:
        """Begin a backward pass: nothing is known of its gradients."""
        self._cache, self._whole = {}, None

    def run(self, ready: tuple[Tensor, ...], sample: int) -> list[Tensor]:
        """Return one sample's gradient of every role."""
        if sample in self._cache:
            return self._cache[sample]
        count = len(self.output_dims)
        grads, outputs, saved = ready[:count], ready[count : 2 * count], ready[2 * count :]
        if self._whole is None and self.random_state is None:
            mine = [
                _rows(out, dim, sample, self.num_samples) for out, dim in zip(outputs, self.output_dims, strict=True)
            ]
            try:
                results, params = self._forward(saved, sample)
            except RuntimeError:  # an operation that insists on the whole batch
                results, params = [], []
            if len(results) == len(mine) and all(_same(a, b) for a, b in zip(results, mine, strict=True)):
                vectors = [
                    _rows(g, dim, sample, self.num_samples) for g, dim in zip(grads, self.output_dims, strict=True)
                ]
                return self._differentiate(results, params, vectors, sample)
        if self._whole is None:
            self._whole = self._forward(saved, None)
        vectors = []
        for grad, dim in zip(grads, self.output_dims, strict=True):
            only = torch.zeros_like(grad)
            _rows(only, dim, sample, self.num_samples).copy_(_rows(grad, dim, sample, self.num_samples))
            vectors.append(only)
        return self._differentiate(*self._whole, vectors, sample)

    def _forward(self, saved: tuple[Tensor, ...], sample: int | None) -> tuple[list[Tensor], list[Tensor]]:
        """Run the operation on one sample, or on all for None; return results and operands."""
        leaves = list(self.leaves)
        params: list[Tensor] = []
        for position, tensor in zip(self.where, saved, strict=True):
            dim = self.dims[position]
            if len(params) < len(self.roles):
                tensor = tensor.detach().requires_grad_()
                params.append(tensor)
            elif sample is not None and dim is not None:
                tensor = _rows(tensor, dim, sample, self.num_samples)
            leaves[position] = tensor
        with torch.enable_grad(), _generators(self.random_state, saved[0].device):
            return self.function(leaves), params

    def _differentiate(
        self, results: list[Tensor], params: list[Tensor], vectors: list[Tensor], sample: int
    ) -> list[Tensor]:
        pairs = [(r, v) for r, v in zip(results, vectors, strict=True) if r.requires_grad]
        grads = torch.autograd.grad(
            [r for r, _ in pairs],
            params,
            [v for _, v in pairs],
            retain_graph=self._whole is not None,
            allow_unused=True,
            materialize_grads=True,
        )
        if (len(self._cache) + 1) * sum(grad.numel() for grad in grads) > CHUNK_ELEMENTS:
            self._cache = {}
        self._cache[sample] = [grad.to(statistic_dtype(grad.dtype)) for grad in grads]
        return self._cache[sample]

    def per_sample(self, role: str, ready: tuple[Tensor, ...], lo: int, hi: int) -> Tensor:
        """Return the gradients of samples lo to hi for one role."""
        index = self.roles.index(role)
        return torch.stack([self.run(ready, sample)[index] for sample in range(lo, hi)])

    def all_moments(self, roles: list[str], ready: tuple[Tensor, ...]) -> list[tuple[Tensor, Tensor]]:
        """Run every sample once for all roles."""
        indices = [self.roles.index(role) for role in roles]
        sums: list[tuple[Tensor, Tensor]] = []
        for sample in range(self.num_samples):
            grads = self.run(ready, sample)
            if not sums:
                sums = [(torch.zeros_like(grads[i]), torch.zeros_like(grads[i])) for i in indices]
            for (total, squares), index in zip(sums, indices, strict=True):
                total.add_(grads[index])
                squares.addcmul_(grads[index], grads[index])
        return sums


class ReplayTap(torch.autograd.Function):
    """A tap on all results of an operation at once."""

    @staticmethod
    def forward(
        ctx: Any, operation: Replay, num_outputs: int, num_saved: int, token: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the results; `tensors` are results, saved tensors, then (operand, shadow) for each role."""
        ctx.operation, ctx.num_saved = operation, num_saved
        outputs = tuple(tensor.detach() for tensor in tensors[:num_outputs])
        ctx.save_for_backward(*outputs, *tensors[num_outputs : num_outputs + num_saved])
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Hand the gradients on and add the operands' gradients and squares."""
        refuse_double_backward()
        ctx.operation.forget()
        with torch.autocast(grads[0].device.type, enabled=False):
            delivered = _deliver(ctx.operation, grads[0], (*grads[1:], *ctx.saved_tensors))
        return (None, None, None, None, *grads, *([None] * ctx.num_saved), *delivered)


def run(scope: Scope, func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation without a rule."""
    name = getattr(func, "__name__", str(func))
    if name.endswith("_") and not name.endswith("__"):
        operand = next(o for value in (*args, *kwargs.values()) if (o := scope.operand(value)) is not None)
        raise UserError(
            f"track: parameter '{operand.bases[0].name}' is used by {name}, which changes a tensor in place, so that it "
            f"cannot be run again for each sample; use {name.rstrip('_')}, {WAY_OUT}"
        )
    if func in _RECURRENT:
        return _run_recurrent(scope, func, args, kwargs, name)
    if func in _CELLS:  # their states are a row for each sample, zeros included
        return _replay(scope, func, args, kwargs, name, lambda tensor: 0, lambda result: 0)
    return _replay(scope, func, args, kwargs, name, _by_mark(scope), lambda result: scope.batch_dim)


def _by_mark(scope: Scope) -> Callable[[Tensor], int | None]:
    return lambda tensor: scope.batch_dim if scope.is_batched(tensor) else None


def run_module(scope: Scope, module: nn.Module, original: Any, args: Any, kwargs: Any) -> Any:
    """Run a module as one operation on its parameters and arguments."""
    tracked = notes(module)
    # By name, which makes them whole under ZeRO-3.
    named = {name: module.get_parameter(name) for name, _ in module.named_parameters()}
    operands = {name: p for name, p in named.items() if scope.operand(p) is not None}

    def call(params: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        state.is_replaying = True
        try:
            with torch.nn.utils.stateless._reparametrize_module(module, params):
                return original(*args, **kwargs)
        finally:
            state.is_replaying = False

    name = f"module '{tracked.path}'"
    return _replay(scope, call, (operands, *args), kwargs, name, _by_mark(scope), lambda result: scope.batch_dim)


def _run_recurrent(scope: Scope, func: Any, args: Any, kwargs: Any, name: str) -> Any:
    if isinstance(args[1], Tensor) and args[1].dtype == torch.int64:
        raise UserError(
            f"track: {name} on a PackedSequence has no per-sample statistic; pad the batch, or use per='micro_batch'"
        )
    batch_dim = 0 if args[-1] else 1  # the last argument of all four is batch_first
    sequence = args[0]
    if sequence.ndim != 3:
        raise UserError(f"track: {name} without a batch dimension has no samples to tell apart")
    states = args[1] if isinstance(args[1], (list, tuple)) else (args[1],)
    outer = scope.batch_dim
    scope.batch_dim = batch_dim
    try:
        results = _replay(
            scope,
            func,
            args,
            kwargs,
            name,
            lambda tensor: batch_dim if tensor is sequence else 1 if any(tensor is h for h in states) else None,
            lambda index: batch_dim if index == 0 else 1,
        )
    finally:
        scope.batch_dim = outer
    for result, dim in zip(results, (batch_dim, 1, 1), strict=False):
        if dim != scope.batch_dim:
            layout.mark(scope, result, dim)
    return results


def _replay(
    scope: Scope,
    func: Any,
    args: Any,
    kwargs: Any,
    name: str,
    dim_of: Callable[[Tensor], int | None],
    output_dim_of: Callable[[int], int],
) -> Any:
    if torch.compiler.is_compiling():
        raise UserError(f"track: {name} has no rule and torch.compile cannot trace the fallback; leave it uncompiled")
    leaves, spec = tree_flatten((args, kwargs))
    found = [(i, operand) for i, leaf in enumerate(leaves) if (operand := scope.operand(leaf)) is not None]
    known = {i for i, _ in found}
    dims = [dim_of(x) if isinstance(x, Tensor) and i not in known else None for i, x in enumerate(leaves)]
    if not all(dim is None or leaf.ndim > dim for leaf, dim in zip(leaves, dims, strict=True)):
        raise UserError(
            f"track: parameter '{found[0][1].bases[0].name}' meets a tensor in {name} in which the samples can no longer be "
            f"told apart; {WAY_OUT}"
        )
    rows = [leaf.shape[dim] for leaf, dim in zip(leaves, dims, strict=True) if dim is not None]
    num_samples = scope.samples_in(rows[0], name)
    if any(count != rows[0] for count in rows):
        raise UserError(f"track: {name} has arguments of {sorted(set(rows))} rows; {WAY_OUT}")
    if name not in _warned:
        _warned.add(name)
        warnings.warn(
            f"{name} has no rule for per-sample squares: each backward pass runs it {num_samples} times over, once for "
            "each sample. track(model, per='micro_batch') costs nothing of the kind.",
            stacklevel=2,
        )
    output_specs: list[TreeSpec] = []

    def function(flat: list[Any]) -> list[Tensor]:
        again_args, again_kwargs = tree_unflatten(flat, spec)
        results, output_spec = tree_flatten(func(*again_args, **again_kwargs))
        output_specs[:] = [output_spec]
        return results

    operands: dict[int, Operand] = {}
    plain = list(leaves)
    for position, operand in found:
        plain[position] = leaves[position].detach()
        operands[position] = operand
    device = found[0][1].tensor.device
    before = _random_state(device)
    results = function(plain)
    after = _random_state(device)
    has_drawn = any(
        a is not None and b is not None and not torch.equal(a, b) for a, b in zip(before, after, strict=True)
    )
    tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and i not in operands]
    where = [*operands, *tensors]
    operation = Replay(
        num_samples,
        function,
        [None if isinstance(leaf, Tensor) else leaf for leaf in leaves],
        where,
        dims,
        [output_dim_of(i) for i in range(len(results))],
        before if has_drawn else None,
    )
    operation.roles = tuple(str(position) for position in operands)
    operation.operands = tuple(operands.values())
    token = scope.token(operation.operands)
    pairs = [t for operand in operation.operands for t in operand.targets()]
    # Detached: through the operands autograd would go on and free the graph that the collector is to differentiate.
    saved = [plain[position] for position in where]
    outputs = ReplayTap.apply(operation, len(results), len(saved), token, *results, *saved, *pairs)
    return tree_unflatten(list(outputs), output_specs[0])


def _rows(tensor: Tensor, dim: int, sample: int, num_samples: int) -> Tensor:
    count = tensor.shape[dim] // num_samples
    return tensor.narrow(dim, sample * count, count)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two results agree but for rounding."""
    if a.shape != b.shape:
        return False
    scale = float(b.detach().abs().max()) if b.numel() else 0.0
    # 1000 units in the last place: sums in another order differ by far less, another sample's data by far more.
    return bool(((a - b).abs() <= 1e3 * torch.finfo(a.dtype).eps * scale).all()) if a.is_floating_point() else True


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


class _generators:
    """Set the generators back for a block, if there is a state to set them to."""

    def __init__(self, state: tuple[Tensor, Tensor | None] | None, device: torch.device):
        self.state, self.device = state, device

    def __enter__(self) -> None:
        if self.state is not None:
            self.now = _random_state(self.device)
            self._set(self.state)

    def __exit__(self, *_: Any) -> None:
        if self.state is not None:
            self._set(self.now)

    def _set(self, state: tuple[Tensor, Tensor | None]) -> None:
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], self.device)
