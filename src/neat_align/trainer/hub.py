"""A model as it leaves its run: with its card, and on the hub where that was asked for.

Trainer uploads its whole output folder. Of a run that would be rounds/ too, text that was written
to be harmful: here one folder goes, `model/`, and of it the files that make the model.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from neat_align.modeling.load_options import named_as
from neat_align.network.hub import (
    check_base,
    license_on_hub,
    make_repository,
    push_folder,
)
from neat_align.reporting.card_facts import CardModel, CardWishes
from neat_align.reporting.card_texts import is_hub_name
from neat_align.reporting.model_card import write_model_card

logger = logging.getLogger(__name__)
MODEL_FOLDER = "model"
_NOTHING_ASKED = CardWishes()


# In these, `trainer` is a NEATTrainer, whose module imports this one.


def card_model(trainer: Any) -> CardModel:
    """What the trainer knows of its model."""
    named = named_as(trainer.policy)
    return CardModel(named["name"], adapter=named["adapter"])


def after_save(trainer: Any, output_dir: str | None, *, pushes: bool) -> None:
    """Once a model is saved: its card beside it, and where `pushes` all of it on the hub."""
    folder = trainer.output_dir if output_dir is None else Path(output_dir)
    if trainer.is_world_process_zero():
        write_model_card(folder, trainer.output_dir, card_model(trainer))
    if pushes:
        trainer.push_to_hub("Model save")


def init_hf_repo(self: Any, token: str | None = None, private: bool | None = None) -> None:
    """Make the repository `hub_model_id` (by default: the output folder's name) on the hub.

    Trainer calls it when it is made with `push_to_hub`, so that a run that could not be pushed ends
    before anything is paid for. Raises HubError, ConfigError.
    """
    if not self.is_world_process_zero():
        return
    named = named_as(self.policy)
    if named["adapter"] is not None:
        check_base(named["name"])
    token = self.args.hub_token if token is None else token
    private = self.args.hub_private_repo if private is None else private
    name = self.args.hub_model_id or self.output_dir.absolute().name
    self.hub_model_id = make_repository(name, token=token, private=private)
    self.push_in_progress = None


def create_model_card(
    self: Any,
    language: str | Sequence[str] | None = None,
    license: str | None = None,
    tags: str | Sequence[str] | None = None,
    model_name: str | None = None,
    finetuned_from: str | None = None,
    dataset: str | Sequence[str] | None = None,
    dataset_name: str | None = None,
) -> None:
    """Write README.md into the output folder; arguments as Trainer's and TRL's, None: from the run.

    A card stands beside every model that is saved; call this to have one with other words in it.
    """
    if self.is_world_process_zero():
        wishes = _wishes(
            language, license, tags, model_name, finetuned_from, dataset or dataset_name
        )
        write_model_card(self.output_dir, self.output_dir, card_model(self), wishes)


def push_to_hub(
    self: Any,
    commit_message: str | None = "End of training",
    blocking: bool = True,
    token: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
    *,
    language: str | Sequence[str] | None = None,
    license: str | None = None,
    tags: str | Sequence[str] | None = None,
    model_name: str | None = None,
    finetuned_from: str | None = None,
    dataset: str | Sequence[str] | None = None,
    dataset_name: str | None = None,
) -> Any:
    """Save the model in `model/` of the output folder, and upload that folder's model, tokenizer
    and card; nothing else of the run.

    Every process calls it. Gives what `HfApi.upload_folder` gives: the commit, or a future where it
    is not `blocking`; None on all processes but the first. Raises HubError, ConfigError.
    """
    if self.hub_model_id is None:
        self.init_hf_repo(token=token, private=private)
    self.save_model(str(self.output_dir / MODEL_FOLDER), _internal_call=True)
    if not self.is_world_process_zero():
        return None
    wishes = _wishes(language, license, tags, model_name, finetuned_from, dataset or dataset_name)
    return push_saved(
        self,
        commit_message or "End of training",
        wishes,
        blocking=blocking,
        token=token,
        revision=revision,
    )


def push_saved(
    trainer: Any,
    message: str,
    wishes: CardWishes = _NOTHING_ASKED,
    *,
    blocking: bool = True,
    token: str | None = None,
    revision: str | None = None,
) -> Any:
    """Upload the model that lies in `model/`, with its card written again; the first process alone.

    Raises HubError, ConfigError.
    """
    args, folder = trainer.args, trainer.output_dir / MODEL_FOLDER
    _tell_loggers(trainer)
    more = getattr(trainer.model, "model_tags", None) or ()  # where a logger shows the run
    name = wishes.name or trainer.hub_model_id.split("/")[-1]
    wishes = replace(wishes, name=name, tags=(*wishes.tags, *more))
    token = args.hub_token if token is None else token
    model = card_model(trainer)
    base = wishes.base or model.base
    if wishes.license is None and is_hub_name(base):
        wishes = replace(wishes, license=license_on_hub(base, token))
    write_model_card(folder, trainer.output_dir, model, wishes)
    return push_folder(
        folder,
        trainer.hub_model_id,
        message=message,
        token=token,
        revision=args.hub_revision if revision is None else revision,
        blocking=blocking,
    )


def _tell_loggers(trainer: Any) -> None:
    """Trainer's event before a push, at which trackio uploads what it has logged.

    With `log_completions` that holds negatives; they go where trackio was pointed, and are not
    published because a model is.
    """
    args = trainer.args
    to_trackio = args.log_completions and "trackio" in args.report_to
    if to_trackio and args.trackio_static_space_id is None:
        logger.warning(
            "trackio's log is not uploaded with the model, since log_completions put completions "
            "into it: set trackio_static_space_id to publish it"
        )
        return
    trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)


def _wishes(
    language: str | Sequence[str] | None,
    license: str | None,
    tags: str | Sequence[str] | None,
    name: str | None,
    base: str | None,
    datasets: str | Sequence[str] | None,
) -> CardWishes:
    return CardWishes(name, _each(language), license, base, _each(tags), _each(datasets))


def _each(given: str | Sequence[str] | None) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given or ())
