"""What a probe is asked to measure."""

from __future__ import annotations

from dataclasses import dataclass

from neat_align.config import PLACEMENTS
from neat_align.errors import ConfigError
from neat_align.evaluation.probe_summary import MIN_PROMPTS
from neat_align.prompts.skipped_rows import check_on_bad_row


@dataclass(frozen=True)
class ProbeSettings:
    """The command's options; names and meanings are those of `train`."""

    bank: str
    model: str
    dataset_name: str = "demo"
    as_conversations: bool = False
    reward: str = "vader"
    allow_http_hosts: tuple[str, ...] = ()
    placement: str = "user_suffix"
    prompts: int = 24
    samples: int = 2
    max_completion_length: int = 48
    temperature: float = 0.7
    seed: int = 0
    generation_batch_size: int = 64
    on_bad_row: str = "error"
    chat_template_kwargs: str | None = None

    def __post_init__(self) -> None:
        if self.placement not in (*PLACEMENTS, "all"):
            raise ConfigError(
                f"placement is {self.placement!r}; it must be one of {', '.join(PLACEMENTS)}, or "
                "all to compare them"
            )
        if self.prompts < MIN_PROMPTS:
            raise ConfigError(
                f"prompts is {self.prompts}; it must be {MIN_PROMPTS} or more: an interval over "
                "fewer means nothing"
            )
        for name in ("samples", "max_completion_length", "generation_batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        check_on_bad_row(self.on_bad_row)
        if self.temperature <= 0:
            raise ConfigError(f"temperature is {self.temperature}; it must be above 0")
