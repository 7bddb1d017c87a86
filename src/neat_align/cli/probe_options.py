"""What a probe is asked to measure."""

from __future__ import annotations

from dataclasses import dataclass

from neat_align.config import PLACEMENTS
from neat_align.errors import ConfigError
from neat_align.evaluation.probe_summary import MIN_PROMPTS
from neat_align.modeling.load_options import LoadOptions
from neat_align.prompts.skipped_rows import check_on_bad_row
from neat_align.sampling.contrast_decoding import Contrast

# Averaging over a few pairs and moving plausible tokens only give the same gain for less drift.
NUM_PAIRS = 3
MIN_P = 0.05


@dataclass(frozen=True)
class ProbeSettings:
    """The command's options; names and meanings are those of `train`.

    With `alpha`, the prompts are also answered from the contrast of the bank's pairs, once with
    each; `pairs` are averaged for a prompt (None: 3), and tokens of at least `min_p`
    times the likeliest one's probability are moved (None: 0.05).
    """

    bank: str
    model: str
    dataset_name: str = "demo"
    as_conversations: bool = False
    as_texts: bool = False
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
    alpha: tuple[float, ...] = ()
    pairs: int | None = None
    min_p: float | None = None
    dtype: str = "float32"

    @property
    def num_pairs(self) -> int:
        """Pairs that are averaged for a prompt; `pairs` None is the default."""
        return NUM_PAIRS if self.pairs is None else self.pairs

    @property
    def cut(self) -> float:
        """The least probability of what is moved; `min_p` None is the default."""
        return MIN_P if self.min_p is None else self.min_p

    @property
    def load_options(self) -> LoadOptions:
        """How the model is loaded."""
        return LoadOptions(self.dtype)

    def __post_init__(self) -> None:
        LoadOptions(self.dtype)  # refuses other values
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
        self._check_decoding()

    def _check_decoding(self) -> None:
        """What is decoded from the contrast, and what shapes it."""
        if not self.alpha:
            for name in ("pairs", "min_p"):
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"{name} shapes what is decoded from the contrast, and no alpha is given: "
                        "add --alpha 0.5 1, or leave it out"
                    )
            return
        if self.reward == "contrast":
            raise ConfigError(
                "alpha decodes from the contrast, which is what the reward contrast measures: name "
                "another reward, or leave alpha out"
            )
        if len(set(self.alpha)) < len(self.alpha):
            raise ConfigError(f"alpha is {self._alphas()}: give each number once")
        if self.num_pairs < 1:
            raise ConfigError(f"pairs is {self.num_pairs}; it must be 1 or more")
        for alpha in self.alpha:
            Contrast(alpha, self.cut)

    def _alphas(self) -> str:
        return " ".join(f"{alpha:g}" for alpha in self.alpha)
