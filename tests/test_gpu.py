"""What only a GPU can show: CUDA autocast, loss scaling, pinned copies, NCCL."""

import sys

import pytest
import torch
from runs import digits, rows_of
from test_cli import TORCHRUN, run

from largebatch.reporting.loggers import read_metrics

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU: CUDA, bf16 and fp16 kernels and NCCL need one"
)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 3e-2), ("fp16", 3e-2)])
def test_a_gpu_follows_the_cpu(precision, tolerance, optimizer, tmp_path):
    flags = {"optimizer.name": optimizer, "optimizer.lr": 1e-3, "loader.num_workers": 1}
    exact, _ = rows_of(digits(**flags, **{"backend.device": "cpu"}), tmp_path / "cpu")
    ours, _ = rows_of(digits(**flags, precision=precision), tmp_path / "gpu")
    # float32 rounding, and 8 to 11 bits of a half-precision product, over ten updates; fp16 may skip its first ones.
    for a, b in list(zip(ours, exact, strict=True))[:10]:
        assert a["loss"] == pytest.approx(b["loss"], rel=tolerance)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL between ranks needs two GPUs or more")
def test_nccl_gives_the_curve_of_one_gpu(tmp_path):
    flags = ["configs/digits.yaml", "--schedule.epochs", "4", "--optimizer.name", "adamw", "--optimizer.lr", "0.001"]
    run(sys.executable, "-m", "largebatch", "train", *flags, "--out", tmp_path / "one")
    run(*TORCHRUN, "--standalone", "--nproc-per-node=2", "-m", "largebatch", "train", *flags, "--out", tmp_path / "two")
    (ones, _), (twos, _) = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert [row["loss"] for row in twos] == pytest.approx([row["loss"] for row in ones], rel=1e-3)
