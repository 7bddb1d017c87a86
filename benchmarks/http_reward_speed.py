"""How long a reward server on this machine takes to score rows, by the rows that a request holds.

`python benchmarks/http_reward_speed.py` asks a server that waits 20 ms in each request, one that
waits 2 ms for each row and one that does not wait, and prints the median of some calls in seconds.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

from neat_align.rewards.http import HttpReward
from neat_align.rewards.protocol import NamedReward
from neat_align.rewards.scoring import score

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from reward_server import Asked, Behaviour, Handler, RewardServer, by_length

ROWS, CALLS = 512, 5
# The default, and requests of one size.
CHUNKS = (None, 8, 16, 64, 128)


def waiting(*, per_request: float = 0.0, per_row: float = 0.0) -> Behaviour:
    """A server that answers after a wait, in seconds."""

    def behaviour(handler: Handler, asked: Asked, number: int) -> None:
        time.sleep(per_request + per_row * len(asked.rows))
        by_length(handler, asked, number)

    return behaviour


def seconds(server: RewardServer, chunk: int | None, rows_per_call: int) -> float:
    """The median time in which all rows are scored, so many a call."""
    server_reward = HttpReward(server.url, **({} if chunk is None else {"batch_size": chunk}))
    reward = NamedReward("server", server_reward, 1.0)
    took = []
    for _ in range(CALLS):
        started = time.perf_counter()
        for first in range(0, ROWS, rows_per_call):
            completions = ["x" * (1 + n % 50) for n in range(first, first + rows_per_call)]
            scored = score(
                (reward,),
                prompts=["What is it?"] * rows_per_call,
                completions=completions,
                completion_ids=[[1]] * rows_per_call,
                columns={},
            )
            assert scored.rewards == tuple(float(len(c)) for c in completions)
        took.append(time.perf_counter() - started)
    return statistics.median(took)


def main() -> None:
    """Print a table."""
    Handler.protocol_version = "HTTP/1.1"  # connections stay open, as a real server's do
    for name, behaviour in (
        ("20 ms a request", waiting(per_request=0.02)),
        ("2 ms a row", waiting(per_row=0.002)),
        ("no wait", waiting()),
    ):
        for rows_per_call in (ROWS, 64):
            with RewardServer(behaviour) as server:
                print(f"{name}, {ROWS} rows, {rows_per_call} a call:")
                for chunk in CHUNKS:
                    took = seconds(server, chunk, rows_per_call)
                    print(f"    {chunk or 'default'} rows a request: {took:.3f} s")


if __name__ == "__main__":
    main()
