"""`neat-align evaluate`: sample and judge, no training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from neat_align.cli.console import ConfigOption, importing, quiet

if TYPE_CHECKING:
    from neat_align.config import NEATConfig
    from neat_align.script_arguments import ScriptArguments


def evaluate(ctx: typer.Context, config: ConfigOption = None) -> None:
    """Sample and judge a model on held-out prompts, no training."""
    with importing():
        quiet()
        from neat_align.cli.options import parse_options

    script, args = parse_options(ctx.args, config)
    evaluate_held_out(script, args)


def evaluate_held_out(script: ScriptArguments, config: NEATConfig) -> None:
    """Sample and judge the model; print the means and keep the whole as JSON."""
    from neat_align.cli.progress import terminal_callbacks
    from neat_align.files.atomic import write_json
    from neat_align.pipeline import build_trainer

    trainer = build_trainer(script, config, terminal_callbacks(config), trains=False)
    trainer.policy.requires_grad_(False)  # nothing is trained
    with trainer.writing():
        metrics = trainer.evaluate()
    assert trainer.last_evaluation is not None
    if not trainer.parts.ranks.is_rank_zero:
        return
    path = trainer.output_dir / "evaluation.json"
    write_json(path, trainer.last_evaluation.to_json())
    print(f"on {len(trainer.last_evaluation.prompt_ids)} held-out prompts")
    width = max(map(len, metrics))
    for name, value in metrics.items():
        print(f"{name:<{width}}  {value:.4g}")
    print(f"completions and scores: {path}")
