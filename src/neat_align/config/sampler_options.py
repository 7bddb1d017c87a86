"""Options of who samples: this process, or a vLLM server beside it."""

from __future__ import annotations

from dataclasses import dataclass

from neat_align.config import combinations
from neat_align.config.constraints import option

# A bf16 server and a bf16 or fp32 trainer differ by at most half of it (docs/using.md).
SAMPLER_TOLERANCE = 0.5


@dataclass
class SamplerOptions:
    """Which engine draws completions, and where it is."""

    sampler: str = option(
        "transformers",
        "Who samples: `transformers`, the policy itself in this process, or `vllm`, a server of "
        "vLLM that was started beside the run (vllm_server) and is given the policy's weights "
        "before every round.",
        choices=("transformers", "vllm"),
    )
    vllm_server: str | None = option(
        None,
        "URL of the vLLM server, such as http://127.0.0.1:8000 (other hosts: https, or "
        "allow_http_hosts). Its --api-key is read from NEAT_ALIGN_VLLM_TOKEN.",
        only_with=combinations.VLLM,
    )
    vllm_concurrency: int = option(
        256,
        "Completions that the vLLM server is asked for at the same time.",
        ge=1,
        only_with=combinations.VLLM,
    )
    vllm_timeout: float = option(
        600.0,
        "Seconds that the vLLM server may take for one completion, its wait in the server's queue "
        "included, or for reading new weights.",
        gt=0,
        only_with=combinations.VLLM,
    )
    vllm_sync_backend: str = option(
        "folder",
        "How the vLLM server gets the policy's weights: `folder`, written and read again, or "
        "`nccl`, from GPU to GPU (all weights, not an adapter; the server needs "
        '--weight-transfer-config \'{"backend": "nccl"}\', and GPUs of its own).',
        choices=("folder", "nccl"),
        only_with=combinations.VLLM,
    )
    vllm_sync_folder: str | None = option(
        None,
        "Folder through which the vLLM server gets the policy's weights; it has to see it under "
        "the same path. None: vllm-weights in output_dir.",
        only_with=combinations.VLLM_FOLDER,
    )
    sampler_tolerance: float = option(
        SAMPLER_TOLERANCE,
        "Stop when a completion's log-probabilities by a sampler outside of this process (vLLM, or "
        "NEATTrainer's `sampler`) and by the trainer differ by more than this times the square "
        "root of its tokens, in nats: it then has other weights.",
        gt=0,
    )
