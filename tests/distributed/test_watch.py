"""What a rank says of the others when it can no longer speak to them."""

import os
import signal
import threading

import torch.distributed as dist

from largebatch.distributed.watch import RankWatch


def test_a_launchers_sigterm_does_not_silence_the_line():
    """A launcher sees a rank die as soon as the others do, and ends those that still wait for its account."""
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        watch = RankWatch(dist.HashStore(), 0, 2)
        watch.store.set("place/1", "there, process 7")
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        said = watch.explain("Connection reset by peer", grace_seconds=0.4)
        assert said == "no word from rank 1 (there, process 7): dead, hanging or cut off (Connection reset by peer)"
        assert heard == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == [signal.SIGTERM], "afterwards it is heard again"
    finally:
        signal.signal(signal.SIGTERM, before)


def test_accounts():
    """A rank that failed by itself is named with its cause; who failed with it only says so."""
    store = dist.HashStore()
    ranks = [RankWatch(store, rank, 3) for rank in range(3)]
    ranks[2].report("ValueError: no such file", is_own=True)
    ranks[1].report("Connection closed", is_own=False)
    assert ranks[0].explain("Connection closed") == "rank 2: ValueError: no such file"
    ranks[2].report("Connection closed", is_own=False)
    assert ranks[0].explain("[a.cc:7] Timed out. Try again") == "the link between the ranks broke (Timed out)"
    assert RankWatch(None, 0, 2).explain("Timed out") == "another rank is dead, hangs or cannot be reached (Timed out)"
