"""Launchers with a torchrun that only notes what it is given."""

import pytest
from jobs import (
    Job,
    no_job_left,  # noqa: F401
    wait_until,
)

# Stands in for torchrun: says what it was given, then does what the test asks of it.
FAKE = r"""#!/usr/bin/env bash
printf '%s\n' "$@" >"$FAKE_LOG"
env >>"$FAKE_LOG"
finish() {
    echo "signal $1" >>"$FAKE_LOG"
    echo begun >>"$LARGEBATCH_EXIT_CODES"
    for code in ${FAKE_RANKS:-}; do echo "$code" >>"$LARGEBATCH_EXIT_CODES"; done
    exit "${FAKE_CODE:-0}"
}
for name in TERM USR1 INT; do trap "finish $name" "$name"; done
if [[ -n ${FAKE_WAIT:-} ]]; then
    touch "$FAKE_OUT/ready"
    while :; do sleep 0.05; done
fi
finish none
"""
CONFIG = "configs/digits.yaml"


@pytest.fixture
def launch(tmp_path):
    """``launch(words, **variables)`` runs torchrun.sh with the stand-in; returns exit code, its words and its environment."""
    fake, log = tmp_path / "fake", tmp_path / "said"
    fake.write_text(FAKE)
    fake.chmod(0o755)
    out = tmp_path / "run"
    out.mkdir()

    given = {"TORCHRUN": fake, "FAKE_LOG": log, "FAKE_OUT": out}

    def run(*words, number=None, **variables):
        log.unlink(missing_ok=True)
        variables = given | variables
        job = Job(["launch/torchrun.sh", *words], tmp_path / "printed", **variables)
        if number is not None:
            wait_until((out / "ready").exists, 20)
            job.send(number)
        code = job.wait(30)
        return code, log.read_text().splitlines() if log.exists() else [], job.printed()

    run.out, run.given = out, given
    return run
