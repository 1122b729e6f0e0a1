"""The scripts in examples/: one process, two, and an update written out by hand arrive at the same weights."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from invariant_oracle import ByHand
from sklearn.datasets import load_digits

FOLDER = Path(__file__).parents[1] / "examples"
PACKAGE = {"ddp": None, "accelerate_loop": "accelerate", "hf_trainer": "transformers", "lightning_module": "lightning"}
BATCH_SIZE, EPOCHS, MAX_NORM = 128, 2, 0.5
TOLERANCE = 1e-12  # float64; measured 1.2e-16


def oracle(updates: list[list[torch.Tensor]]) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Return the weights after these updates, each a list of micro-batches, by hand; and the norms before clipping."""
    generator_state, default = torch.get_rng_state(), torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        digits = load_digits()
        order = torch.randperm(len(digits.target))
        inputs, targets = torch.tensor(digits.data)[order] / 16, torch.tensor(digits.target)[order]
        model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    finally:
        torch.set_default_dtype(default)
        torch.set_rng_state(generator_state)
    hand = ByHand(model.parameters(), "adamw", 16, lr=1e-3, wd=0.01)
    norms = []
    for units in updates:
        rows = [torch.autograd.grad(F.cross_entropy(model(inputs[u]), targets[u]), hand.params) for u in units]
        stacked = [torch.stack(tensors) for tensors in zip(*rows, strict=True)]
        norms.append(float(torch.stack([g.mean(0).norm() for g in stacked]).norm()))
        hand.step(stacked, [len(u) for u in units], min(1.0, MAX_NORM / (norms[-1] + 1e-6)))
    return model.state_dict(), norms


def updates_of(name: str, processes: int, micro_size: int = 32) -> list[list[torch.Tensor]]:
    """Return the micro-batches of every update."""
    batches = list(torch.arange(1536).repeat(EPOCHS).split(BATCH_SIZE))
    if name == "lightning_module":  # its sampler deals samples to the ranks one by one
        return [[u for rank in range(processes) for u in b[rank::processes].split(micro_size)] for b in batches]
    return [list(batch.split(micro_size)) for batch in batches]


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert list(one) == list(other) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    return max(float((one[key] - other[key]).abs().max()) for key in one)


def run(name: str, processes: int, micro_size: int, path: Path) -> dict:
    """Run a script on its own, or by torchrun, with micro-batches of this size."""
    text = (FOLDER / f"{name}.py").read_text()
    settings = "BATCH_SIZE, MICRO_SIZE, EPOCHS, MAX_NORM = 128, 32, 2, 0.5"
    assert settings in text
    script = path.with_suffix(".py")
    script.write_text(text.replace(settings, settings.replace("32", str(micro_size))))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, str(script), "--dtype", "float64", "--out", str(path)]
    variables = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "SLURM_"))}
    variables |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    done = subprocess.run(command, env=variables, cwd=path.parent, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return torch.load(path) | {"accuracy": float(re.search(r"accuracy ([\d.]+)", done.stdout)[1])}


def require(package: str | None) -> None:
    """Skip where the script's package is missing, or cannot be imported for another package's sake."""
    if package is None:
        return
    for needed in (package, "accelerate") if package == "transformers" else (package,):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"not installed: {needed}")
    if package in ("transformers", "lightning") and importlib.util.find_spec("torchvision") is not None:
        try:
            import torchvision  # noqa: F401
        except Exception as error:  # an operator of another torch: RuntimeError, OSError, AttributeError
            pytest.skip(f"{package} imports torchvision, which does not fit this torch: {error}")


@pytest.mark.parametrize("name", PACKAGE)
def test_the_librarys_part_is_small_and_counted(name):
    """The import and one line, as the docstring says."""
    text = (FOLDER / f"{name}.py").read_text()
    blocks = re.findall(r"^ *# >>> largebatch\n(.*?)^ *# <<<$", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.strip() and line.strip()[0] != "#"]
    count = len(lines) + len(re.findall(r"^import largebatch$", text, re.MULTILINE))
    assert text.count("# >>> largebatch\n") == len(blocks)
    assert count == 2
    assert f"\n{count} lines are this library's" in text
    others = re.sub("|".join(map(re.escape, blocks)), "", text)
    assert "largebatch" not in re.sub(r'(?s)^""".*?"""|import largebatch|# >>> largebatch', "", others)


def test_the_ddp_script_on_one_process_is_the_plain_loop(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    spec = importlib.util.spec_from_file_location("ddp_example", FOLDER / "ddp.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    default = torch.get_default_dtype()
    try:
        module.main(torch.float64, str(tmp_path / "out.pt"))
    finally:
        torch.set_default_dtype(default)
    found = torch.load(tmp_path / "out.pt")
    expected, norms = oracle(updates_of("ddp", 1))
    assert min(norms) < MAX_NORM < max(norms)  # some updates are clipped, some are not
    assert distance(found["model"], expected) < TOLERANCE
    assert len(found["optimizer"]["state"]) == len(expected)
    assert found["optimizer"]["param_groups"][0]["batch_size_invariant"]["samples_seen"] == 1536 * EPOCHS


def test_the_hugging_face_script_says_which_transformers_it_needs(monkeypatch):
    stub = types.ModuleType("transformers")
    stub.Trainer = stub.TrainingArguments = None
    stub.__version__ = "4.57.3"
    monkeypatch.setitem(sys.modules, "transformers", stub)
    spec = importlib.util.spec_from_file_location("hf_example", FOLDER / "hf_trainer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(SystemExit, match=r"needs transformers 5 or later, not 4\.57\.3"):
        module.main(torch.float64, None)


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("name", PACKAGE)
def test_one_process_and_two_are_the_update_by_hand(name, accumulation, tmp_path):
    require(PACKAGE[name])
    for processes in (1, 2):
        micro_size = BATCH_SIZE // (processes * accumulation)
        found = run(name, processes, micro_size, tmp_path / f"of_{processes}.pt")
        expected, norms = oracle(updates_of(name, processes, micro_size))
        assert min(norms) < MAX_NORM < max(norms)
        assert found["accuracy"] > (0.8 if accumulation == 4 else 0.7)  # one unit alone: 0.785
        assert distance(found["model"], expected) < TOLERANCE
        assert found["optimizer"]["param_groups"][0]["batch_size_invariant"]["samples_seen"] == 1536 * EPOCHS
