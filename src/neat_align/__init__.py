"""neat-align: negative-prompt-driven alignment of language models (NEAT, arXiv:2410.12194).

The public API is what `__all__` names; nothing else is promised. Names are loaded when they are
first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neat_align.cli.progress import terminal_callbacks
    from neat_align.config import NEATConfig
    from neat_align.errors import (
        CollapseError,
        ConfigError,
        DataError,
        HubError,
        NEATError,
        PromptError,
        RewardError,
        RewardTimeoutError,
        RewardUnavailableError,
        SamplerError,
        SamplerUnavailableError,
    )
    from neat_align.prompts.dataset_config import DatasetConfig
    from neat_align.prompts.loading import load_rows
    from neat_align.prompts.rows import PromptRow
    from neat_align.reporting.run_report import write_report
    from neat_align.rewards.protocol import Unscorable
    from neat_align.rounds.completions import Completion, CompletionGroup, read_groups
    from neat_align.rounds.exports import preference_rows, ranked_rows
    from neat_align.rounds.group_file import GroupFile
    from neat_align.sampling.contrast_decoding import ContrastLogitsProcessor, contrast_processor
    from neat_align.sampling.policy_now import PolicyNow
    from neat_align.sampling.protocol import Sample, Sampler, SampleRequest, SamplingParams
    from neat_align.trainer import NEATTrainer

__version__ = "0.1.0"

_HOMES = {
    "NEATConfig": "config",
    "NEATTrainer": "trainer",
    "Completion": "rounds.completions",
    "CompletionGroup": "rounds.completions",
    "read_groups": "rounds.completions",
    "GroupFile": "rounds.group_file",
    "ranked_rows": "rounds.exports",
    "preference_rows": "rounds.exports",
    "ContrastLogitsProcessor": "sampling.contrast_decoding",
    "contrast_processor": "sampling.contrast_decoding",
    "PolicyNow": "sampling.policy_now",
    "Sample": "sampling.protocol",
    "SampleRequest": "sampling.protocol",
    "Sampler": "sampling.protocol",
    "SamplingParams": "sampling.protocol",
    "DatasetConfig": "prompts.dataset_config",
    "PromptRow": "prompts.rows",
    "load_rows": "prompts.loading",
    "Unscorable": "rewards.protocol",
    "write_report": "reporting.run_report",
    "terminal_callbacks": "cli.progress",
    "HubError": "errors",
    "NEATError": "errors",
    "ConfigError": "errors",
    "DataError": "errors",
    "PromptError": "errors",
    "RewardError": "errors",
    "RewardTimeoutError": "errors",
    "RewardUnavailableError": "errors",
    "SamplerError": "errors",
    "SamplerUnavailableError": "errors",
    "CollapseError": "errors",
}

__all__ = [
    "CollapseError",
    "Completion",
    "CompletionGroup",
    "ConfigError",
    "ContrastLogitsProcessor",
    "DataError",
    "DatasetConfig",
    "GroupFile",
    "HubError",
    "NEATConfig",
    "NEATError",
    "NEATTrainer",
    "PolicyNow",
    "PromptError",
    "PromptRow",
    "RewardError",
    "RewardTimeoutError",
    "RewardUnavailableError",
    "Sample",
    "SampleRequest",
    "Sampler",
    "SamplerError",
    "SamplerUnavailableError",
    "SamplingParams",
    "Unscorable",
    "contrast_processor",
    "load_rows",
    "preference_rows",
    "ranked_rows",
    "read_groups",
    "terminal_callbacks",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"neat_align.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'neat_align' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
