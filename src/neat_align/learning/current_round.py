"""The groups that are being learned from, as the fixed-length data set that Trainer asks for."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from neat_align.rounds.completions import CompletionGroup


class CurrentRoundDataset(torch.utils.data.Dataset[CompletionGroup]):
    """A data set of fixed length whose groups are swapped every round.

    The groups of a round are a file (`GroupFile`): a group is read when a batch asks for it.
    A round that holds fewer groups than the length (too few prompts made a pair) is gone through
    again from its start.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.groups: Sequence[CompletionGroup] = ()

    def __len__(self) -> int:
        """Groups per round."""
        return self.length

    def __getitem__(self, index: int) -> CompletionGroup:
        """The group at an index of this round."""
        return self.groups[index % len(self.groups)]
