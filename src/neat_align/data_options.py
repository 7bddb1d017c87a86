"""Which data a run reads: one data set, a mixture, and which of their columns is what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from neat_align.config.constraints import OnlyWith, option, read_object
from neat_align.errors import ConfigError
from neat_align.prompts.dataset_config import (
    DatasetConfig,
    as_dataset_config,
    check_columns,
    check_mixture,
)


def _of_eval(name: str) -> OnlyWith:
    return OnlyWith(
        "eval_dataset_name",
        f"{name} is {{c.{name}!r}}, but there is no eval_dataset_name for it to be said of",
        none_of=(None,),
    )


@dataclass(kw_only=True)
class DataOptions:
    """Data beside what `ScriptArguments` says of it. Names follow TRL's scripts."""

    dataset_config: str | None = option(
        None, "Configuration of a hub data set to train on: its name on the data set's page."
    )
    dataset_columns: dict[str, str] | str | None = option(
        None,
        "Columns of the training data under the names that are read, as JSON (a mapping in "
        'recipes): {"prompt": "question", "chosen": "good"}.',
    )
    datasets: list[DatasetConfig] = field(
        default_factory=list,
        metadata={
            "help": "A mixture in the place of dataset_name, as TRL has it: a list, each entry "
            "with path, name, split, columns and fraction (its share; without, all rows of all)."
        },
    )
    dataset_streaming: bool = option(
        False,
        "expand: read the rows as they are needed, prompts_per_round at a time, and hold no more "
        "in memory; all of them are taken.",
    )
    eval_dataset_config: str | None = option(
        None,
        "Configuration of a hub data set to evaluate on.",
        only_with=(_of_eval("eval_dataset_config"),),
    )
    eval_dataset_columns: dict[str, str] | str | None = option(
        None,
        "dataset_columns of the held-out data.",
        only_with=(_of_eval("eval_dataset_columns"),),
    )

    def read_data_options(self) -> None:
        """Turn what came as text into data sets and mappings. Raises ConfigError."""
        for name in ("dataset_columns", "eval_dataset_columns"):
            if not isinstance(getattr(self, name), list | tuple):
                read_object(self, name)
            check_columns(getattr(self, name), name)
        if isinstance(self.datasets, str | Mapping | DatasetConfig):
            self.datasets = [self.datasets]  # type: ignore[list-item]
        given = enumerate(self.datasets or [])
        self.datasets = [as_dataset_config(entry, f"datasets[{i}]") for i, entry in given]
        check_mixture(self.datasets)
        if any(entry.path == "demo" for entry in self.datasets):
            raise ConfigError(
                "datasets names demo, whose prompts are in no mixture: set dataset_name: demo, or "
                "take it out"
            )
