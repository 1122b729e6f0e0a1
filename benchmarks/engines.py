"""What each engine holds, sends and takes for an update, with squared gradients and without.

    python benchmarks/engines.py --ranks 2 --rounds 7 [--squares micro_batch]
    python benchmarks/engines.py --engines ddp fsdp zero-3 --depth 12 --width 1024 --batch-size 8

A GPT under AdamW, float32; one process a rank, on GPUs through NCCL where there are some, else on the processor through gloo.
An engine is started with and without squares (of its one pass on each rank, or of every sample), each in processes of its own,
which take turns: an update of the one, an update of the other, so that what else the machine does falls on both alike; medians.

    held    unique storages of every tensor of a rank between backward pass and update, less the batch: weights, shadows,
            gradients, optimizer state, and the engine's own copies and buffers
    peak    of allocated memory on a GPU; else of resident memory over what the process had before it built the model
    sent    what a rank sends in an update, by rings: of N bytes handed to an all-reduce 2 (W-1)/W N, to a reduce-scatter, an
            all-gather (N gathered), a broadcast or a reduce (W-1)/W N; N counted where torch dispatches collectives

Bytes are in units of P, the number of the model's own parameters: DDP under plain AdamW holds 4 P of weights, 4 P of
gradients and 8 P of moments.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import socket
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from largebatch.distributed import BackendConfig, create_backend, launched_ranks
from largebatch.models import GPT
from largebatch.optim import AdamW, param_groups

ENGINES: dict[str, dict[str, Any]] = {"ddp": {"name": "ddp"}, "fsdp": {"name": "fsdp"}}
# DeepSpeed's own values set aside 2 GB for a bucket, and keep what ZeRO-3 has gathered until the backward pass.
SMALL: dict[str, Any] = {"reduce_bucket_size": 2**21, "allgather_bucket_size": 2**21}
SMALL |= {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0}
SMALL |= {"stage3_max_live_parameters": 1, "stage3_max_reuse_distance": 0}
ENGINES |= {
    f"zero-{stage}": {"name": "deepspeed", "ds_config": {"zero_optimization": {"stage": stage, **SMALL}}}
    for stage in range(4)
}
VOCABULARY = 4096


class Traffic(TorchDispatchMode):
    """Counts the bytes that a rank sends by rings, by kind of collective, in the thread that it is entered in."""

    def __init__(self, world_size: int) -> None:
        super().__init__()
        self.share = (world_size - 1) / world_size
        self.sent: dict[str, float] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, and run."""
        name = func._schema.name
        if name.startswith("c10d::"):
            kind = name.removeprefix("c10d::").strip("_")
            if "gather" in kind:
                kind, tensors, factor = "all-gather", args[0], 1.0
            elif "reduce_scatter" in kind:
                kind, tensors, factor = "reduce-scatter", args[1], 1.0
            else:
                tensors, factor = args[0], 2.0 if kind.startswith("allreduce") else 1.0
            size = sum(t.numel() * t.element_size() for t in _leaves(tensors))
            self.sent[kind] = self.sent.get(kind, 0.0) + factor * self.share * size
        return func(*args, **(kwargs or {}))


def _leaves(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [tensor for item in value for tensor in _leaves(item)]


def held_bytes() -> int:
    """Return the bytes of all tensors of this process, memory that several share counted once."""
    gc.collect()
    storages: dict[int, int] = {}
    pending = [item for item in gc.get_objects() if issubclass(type(item), Tensor)]
    while pending:
        tensor = pending.pop()
        local = getattr(tensor, "_local_tensor", None)
        if local is not None:
            pending.append(local)
        elif not tensor.is_meta:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        if tensor.is_leaf and tensor.grad is not None:  # autograd may hold it alone
            pending.append(tensor.grad)
    return sum(storages.values())


def _resident(field: str) -> int:
    """Return VmRSS (resident memory now) or VmHWM (its peak) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


class Bench:
    """One rank of a model in training under an engine."""

    def __init__(self, engine: str, is_tracked: bool, options: argparse.Namespace) -> None:
        self.backend = create_backend(BackendConfig(**ENGINES[engine]), "fp32", launched_ranks())
        world_size, self.device = self.backend.world_size, self.backend.device
        self.global_batch = options.batch_size * world_size
        torch.manual_seed(0)
        self.base = held_bytes()
        if self.device.type == "cpu":
            Path("/proc/self/clear_refs").write_text("5")  # sets the peak to the present
            self.base_resident = _resident("VmRSS")
        model = GPT(VOCABULARY, options.length, options.depth, options.width // 64, options.width)
        self.num_parameters = sum(p.numel() for p in model.parameters())
        self.num_units = self.global_batch if options.squares == "sample" else world_size
        if is_tracked:
            self.backend.track(model, options.squares)
        self.model, self.optimizer = self.backend.prepare(
            model, lambda bare: AdamW(param_groups(bare, 0.01), 1e-4, reference_batch_size=32 if is_tracked else None)
        )
        if is_tracked:
            self.backend.use_squares(self.optimizer)
        tokens = torch.randint(VOCABULARY, (options.batch_size, options.length + 1), device=self.device)
        self.inputs, self.targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def backward(self) -> None:
        """Do the passes of one update."""
        self.backend.begin_update(self.global_batch, self.num_units, 0)
        with self.backend.accumulate(sync=True):
            with self.backend.autocast():
                outputs = self.model(self.inputs)
                loss = F.cross_entropy(outputs.flatten(0, 1), self.targets.flatten(), reduction="sum")
            self.backend.backward(loss / (self.global_batch * self.targets.shape[1]))

    def step(self) -> None:
        """Update."""
        self.optimizer.set_batch(self.global_batch, self.num_units, self.backend.world_size)
        self.backend.step(self.optimizer)

    def update(self) -> float:
        """Do an update together with the other ranks; return its seconds."""
        self.backend.barrier()
        began = time.perf_counter()
        self.backward()
        self.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def memory_and_traffic(self) -> dict[str, Any]:
        """Return what an update sends, what is held before it steps, and the peak so far, in bytes."""
        with Traffic(self.backend.world_size) as traffic:
            self.backward()
            # After the passes: weights and moments are there from the updates before.
            held = held_bytes() - self.base - self.inputs.nbytes - self.targets.nbytes
            self.step()
        is_gpu = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated() if is_gpu else _resident("VmHWM") - self.base_resident
        return {"held": held, "peak": peak, "sent": traffic.sent, "parameters": self.num_parameters}


def serve(rank: int, port: int, engine: str, is_tracked: bool, options: argparse.Namespace, pipe: Connection) -> None:
    """Be one rank: do what the pipe says."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(options.ranks)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(options.threads)
    os.dup2(2, 1)  # the table has the output for itself
    bench = Bench(engine, is_tracked, options)
    for command in iter(pipe.recv, None):
        pipe.send(getattr(bench, command)())
    backend = bench.backend
    del bench
    backend.close()


class Ranks:
    """The processes of one engine, with or without the statistic."""

    def __init__(self, engine: str, is_tracked: bool, options: argparse.Namespace) -> None:
        context = multiprocessing.get_context("spawn")
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self.pipes, self.processes = [], []
        for rank in range(options.ranks):
            ours, theirs = context.Pipe()
            arguments = rank, port, engine, is_tracked, options, theirs
            self.processes.append(context.Process(target=serve, args=arguments, daemon=True))
            self.processes[-1].start()
            theirs.close()
            self.pipes.append(ours)

    def __call__(self, command: str) -> list[Any]:
        """Return each rank's answer; EOFError if a rank has failed, which says why itself."""
        for pipe in self.pipes:
            pipe.send(command)
        return [pipe.recv() for pipe in self.pipes]

    def close(self) -> None:
        """End them."""
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join()


def measure(engine: str, options: argparse.Namespace) -> str:
    """Return the engine's row."""
    both = [Ranks(engine, is_tracked, options) for is_tracked in (False, True)]
    times: list[list[float]] = [[], []]
    for number in range(options.rounds + 2):
        for which in (0, 1) if number % 2 else (1, 0):
            seconds = max(both[which]("update"))
            if number >= 2:  # the first ones set up optimizer state, buckets and prefetching
                times[which].append(seconds)
    found = [ranks("memory_and_traffic") for ranks in both]
    for ranks in both:
        ranks.close()
    unit = found[0][0]["parameters"]

    def cells(key: str) -> str:
        return " | ".join(f"{max(rank[key] for rank in ranks) / unit:.2f}" for ranks in found)

    sent = " | ".join(
        f"{sum(ranks[0]['sent'].values()) / unit:.2f} ("
        + ", ".join(f"{kind} {size / unit:.2f}" for kind, size in ranks[0]["sent"].items() if size > 0.005 * unit)
        + ")"
        for ranks in found
    )
    plain, ours = map(statistics.median, times)
    return f"| {engine} | {cells('held')} | {cells('peak')} | {sent} | {plain:.2f} | {ours:.2f} | {ours / plain:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each rank")
    parser.add_argument("--rounds", type=int, default=7, help="timed updates of each")
    parser.add_argument("--depth", type=int, default=8, help="blocks")
    parser.add_argument("--width", type=int, default=512, help="a multiple of 64")
    parser.add_argument("--length", type=int, default=64, help="tokens of a sample")
    parser.add_argument("--batch-size", type=int, default=4, help="samples of a rank")
    parser.add_argument("--squares", choices=["micro_batch", "sample"], default="micro_batch")
    options = parser.parse_args()
    on = f"{torch.cuda.get_device_name()}, nccl" if torch.cuda.is_available() else "CPU, gloo"
    model = GPT(VOCABULARY, options.length, options.depth, options.width // 64, options.width)
    unit = sum(p.numel() for p in model.parameters())
    print(
        f"torch {torch.__version__}, {options.ranks} ranks, {on}; GPT of {unit / 1e6:.1f} M parameters, float32, AdamW;"
    )
    print(
        f"{options.batch_size} samples of {options.length} tokens a rank; bytes in units of P = {unit / 1e6:.1f} MB\n"
    )
    print(
        f"squares of: {options.squares}\n\n"
        "| engine | held: plain | squares | peak: plain | squares | sent: plain | squares | update, s: plain | squares "
        "| ratio |"
    )
    print("|" + "---|" * 10, flush=True)
    for engine in options.engines:
        print(measure(engine, options), flush=True)


if __name__ == "__main__":
    main()
