"""Giving a vLLM server all weights by NCCL: what its weight-transfer engine wants of a trainer.

vLLM need not be installed here. The server and rank 0 join a group by NCCL's unique id, once; then,
for every version: pause, start, rank 0's broadcasts while the server receives them one by one,
finish, resume. A server that failed in between stays paused: nobody samples from half of the
weights. The order of requests is vLLM's own (its documentation, "weight transfer", 0.30 and later).

**Unchecked on NCCL and GPUs**: no machine of ours has one. Checked are the endpoints, against vLLM
0.32 on a CPU, the order, against a stand-in, and the calls of NCCL's library up to the missing GPU.
"""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass, field
from typing import Any

import torch

from neat_align.errors import ConfigError, SamplerUnavailableError
from neat_align.modeling.whole_weights import Form
from neat_align.sampling.nccl import TYPES, Nccl, NcclGroup
from neat_align.sampling.vllm_client import VllmClient


@dataclass
class VllmNccl:
    """Rank 0's side; `timeout` is in seconds, for the server's part and for each broadcast."""

    client: VllmClient
    nccl: Nccl
    timeout: float
    _group: NcclGroup | None = field(default=None, init=False)

    def begin(self, device: torch.device) -> str:
        """Have the server wait for weights, which will come from this GPU; its model's name.

        Raises SamplerError and SamplerUnavailableError.
        """
        served = self.client.model()
        if self._group is None:
            self._group = self._joined(device)
        self.client.transfer("/pause?mode=wait")
        self.client.transfer("/start_weight_update")
        return served.name

    def _joined(self, device: torch.device) -> NcclGroup:
        self.client.transfer("/shutdown_weight_transfer_engine")  # of an earlier process of the run
        unique_id, members = self.nccl.unique_id(), 1 + self.client.workers()
        info = {
            "nccl_unique_id_b64": base64.b64encode(unique_id).decode("ascii"),
            "rank_offset": 1,
            "world_size": members,
            "packed": False,
        }

        def join() -> NcclGroup:
            group = self.nccl.join(unique_id, members, device)
            group.warm_up()
            return group

        joined = _started(join)
        answered = _started(
            lambda: self.client.transfer("/init_weight_transfer_engine", {"init_info": info})
        )
        done, left = wait([joined, answered], self.timeout, return_when=FIRST_EXCEPTION)
        for task in done:
            task.result()
        if left:
            raise SamplerUnavailableError(
                f"{self.client.said} and this process did not meet over NCCL within "
                f"{self.timeout:g} s: they need GPUs of their own that reach each other, and the "
                f"same version of NCCL ({self.nccl.version()} here); NCCL_DEBUG=INFO says more"
            )
        group: NcclGroup = joined.result()
        return group

    def send(
        self, forms: Sequence[Form], weights: Iterable[tuple[str, torch.Tensor]]
    ) -> Exception | None:
        """Broadcast the weights, which are of these forms; what went wrong.

        Goes through all of them whatever happens: other ranks gather them with this one.
        """
        told = {
            "names": [form.name for form in forms],
            "dtype_names": [str(form.dtype).removeprefix("torch.") for form in forms],
            "shapes": [list(form.shape) for form in forms],
        }
        received = _started(lambda: self.client.transfer("/update_weights", {"update_info": told}))
        failure: Exception | None = None
        for _, value in weights:
            if failure is None:
                failure = self._sent(value, received)
        if failure is None:
            failure = self._failure_of(received)
        if failure is not None and self._group is not None:
            self._group.abort()
            self._group = None
        return failure

    def _sent(self, value: torch.Tensor, received: Future[None]) -> Exception | None:
        """Send one; a server that has given up will never receive it."""
        assert self._group is not None
        group = self._group
        sending = _started(lambda: group.broadcast(value))
        wait([sending, received], self.timeout, return_when=FIRST_COMPLETED)
        gave_up = received.done() and received.exception() is not None
        return self._failure_of(received if gave_up else sending)

    def _failure_of(self, task: Future[None]) -> Exception | None:
        """What went wrong with a task, once it has ended."""
        try:
            task.result(self.timeout)
        except TimeoutError:
            return SamplerUnavailableError(
                f"{self.client.said} has not received the weights within {self.timeout:g} s "
                "(vllm_timeout): look at its log, and start it again"
            )
        except Exception as error:  # noqa: BLE001 - raised by `finish`, on all ranks
            return error
        return None

    def finish(self, version: str, failure: Exception | None) -> None:
        """Have the server sample again, from the weights that were sent."""
        if failure is not None:
            raise failure
        self.client.transfer("/finish_weight_update", {"weight_version": version})
        self.client.reset_cache()
        self.client.transfer("/resume")


def check_sendable(model: Any, forms: Sequence[Form]) -> None:
    """Refuse weights that the server would not know by their names here. Raises ConfigError."""
    from transformers.core_model_loading import revert_weight_conversion

    strange = [form.name for form in forms if form.dtype not in TYPES]
    if strange:
        raise ConfigError(
            f"vllm_sync_backend is nccl, and {strange[0]} is of a number type that is not sent: "
            "set vllm_sync_backend: folder"
        )
    here = {f.name: torch.empty(f.shape, dtype=f.dtype, device="meta") for f in forms}
    saved = revert_weight_conversion(model, dict(here))
    shapes = [{name: tuple(t.shape) for name, t in state.items()} for state in (here, saved)]
    if shapes[0] != shapes[1]:
        other = next(name for name in sorted(shapes[1]) if shapes[0].get(name) != shapes[1][name])
        raise ConfigError(
            f"vllm_sync_backend is nccl, and transformers holds the weights of this "
            f"{type(model).__name__} in another form than its files ({other}), which is what vLLM "
            "reads: set vllm_sync_backend: folder"
        )


def _started(work: Callable[[], Any]) -> Future[Any]:
    """Work that runs meanwhile, in a thread that the process does not wait for at its end."""
    task: Future[Any] = Future()

    def run() -> None:
        try:
            task.set_result(work())
        except Exception as error:  # noqa: BLE001 - it is raised where the task is asked for
            task.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return task
