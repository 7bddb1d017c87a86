"""`neat-align expand --engine ray`: what its workers are, and the Ray that they run under.

Ray runs on this machine alone unless an address is given: nothing listens beyond the loopback
interface, no dashboard is started, and nothing is reported to anybody.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import secrets
import socket
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, cast

from neat_align.errors import ConfigError, one_line

if TYPE_CHECKING:
    from neat_align.config import NEATConfig
    from neat_align.prompts.rows import PromptRow
    from neat_align.rounds.params import RoundTools
    from neat_align.rounds.ray_shards import RayShards
    from neat_align.rounds.round_files import FinishedRound
    from neat_align.script_arguments import ScriptArguments
    from neat_align.trainer import NEATTrainer

# Rows that a worker's checks of the model look at: those that a trainer's look at.
_LOOKED_AT = 2
_ANSWER_SECONDS = 10


@dataclass(frozen=True)
class RayOptions:
    """How many workers of each stage, and where. None: what an option is when it is left out.

    `shard_prompts` prompts are one worker's piece of work; None is the slice of the local engine.
    """

    num_workers: int | None = None
    gpus_per_worker: float | None = None
    num_reward_workers: int | None = None
    gpus_per_reward_worker: float | None = None
    shard_prompts: int | None = None
    ray_address: str | None = None

    @property
    def policy_workers(self) -> int:
        """Workers that hold the policy."""
        return self.num_workers or 1

    @property
    def reward_workers(self) -> int:
        """Workers that score."""
        return self.num_reward_workers or 1

    @property
    def policy_gpus(self) -> float:
        """GPUs of a worker that holds the policy; 0 is the CPU."""
        return self.gpus_per_worker or 0

    @property
    def reward_gpus(self) -> float:
        """GPUs of a worker that scores."""
        return self.gpus_per_reward_worker or 0

    def given(self) -> list[str]:
        """The options that were given."""
        return [f.name for f in fields(self) if getattr(self, f.name) is not None]


def check_engine(engine: str, ray: RayOptions) -> None:
    """Refuse an engine that is none, and options that the engine would ignore."""
    if engine not in ("local", "ray"):
        raise ConfigError(f"engine is {engine!r}; it must be local or ray")
    if engine == "local":
        if ray.given():
            name = ray.given()[0]
            raise ConfigError(
                f"{name} is {getattr(ray, name)!r}, which only --engine ray reads: leave it out, "
                "or add --engine ray"
            )
        return
    if ray.num_workers is None:
        raise ConfigError("engine is ray: say how many workers hold the policy, --num_workers")
    for name in ("num_workers", "num_reward_workers", "shard_prompts"):
        value = getattr(ray, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; it must be 1 or more")
    for name in ("gpus_per_worker", "gpus_per_reward_worker"):
        value = getattr(ray, name)
        if value is not None and not 0 <= value <= 1:
            raise ConfigError(
                f"{name} is {value:g}; it must be 0 (the CPU), 1, or a part of one: a worker's "
                "model stands on one GPU"
            )


def check_ray_run(script: ScriptArguments, config: NEATConfig, ray: RayOptions) -> None:
    """Refuse what this run's workers would ignore, or make differently than the local engine."""
    if config.world_size > 1:
        raise ConfigError(
            f"engine is ray and {config.world_size} processes were launched: start one process; "
            "Ray starts the workers (--num_workers)"
        )
    if not script.reward_funcs:
        for name in ("num_reward_workers", "gpus_per_reward_worker"):
            if getattr(ray, name) is not None:
                raise ConfigError(f"{name} is given and reward_funcs is empty: leave it out")
    if ray.shard_prompts is not None and config.negative_source == "other_prompts":
        raise ConfigError(
            f"shard_prompts is {ray.shard_prompts} and negative_source is other_prompts: which "
            "prompts a negative can be from would depend on it; leave shard_prompts out"
        )


def cluster_address(options: RayOptions) -> str | None:
    """The address of the cluster that the workers are on; None: of this machine alone."""
    return options.ray_address or os.environ.get("RAY_ADDRESS") or None


def import_ray(*, address: str | None) -> Any:
    """The `ray` package, once nothing of it speaks or listens that was not asked for.

    Raises ConfigError where it is not installed, or nobody answers at the address.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Whoever is still at work in a thread when Ray is shut down would start a second one.
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
    # Its C++ part warns on every start of what Ray Data does with its own actors; what goes wrong
    # is raised.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    if address is None:
        # Ray's word for a cluster of one machine, which then has the address 127.0.0.1: else its
        # servers listen on every interface. It reads both when it is imported.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        # Other users of the machine can reach the ports, and whoever may speak there runs code.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    else:
        _check_answers(address)
    try:
        importlib.import_module("ray.data")
        return importlib.import_module("ray")
    except ImportError as error:
        raise ConfigError(
            f"engine is ray and Ray Data cannot be imported ({error}): pip install "
            "'neat-align[ray]'"
        ) from error


def _check_answers(address: str) -> None:
    """Refuse an address where nobody answers: Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():  # "auto": Ray finds the cluster that was started here
        return
    try:
        name = host.rpartition("//")[2].strip("[]")
        socket.create_connection((name, int(port)), timeout=_ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(error) from error


def _no_cluster(error: Exception) -> ConfigError:
    return ConfigError(
        f"Ray cannot be reached ({one_line(error)}): correct ray_address (or RAY_ADDRESS), or "
        "leave it out to run on this machine alone"
    )


@contextlib.contextmanager
def connected(options: RayOptions, *, has_rewards: bool) -> Iterator[None]:
    """Ray while the block runs: the given cluster, or one of this machine's that ends with it."""
    address = cluster_address(options)
    ray = import_ray(address=address)
    started: dict[str, Any] = {"address": address, "log_to_driver": False}
    if address is None:
        needed = _cpus(options) * options.policy_workers + (
            options.reward_workers if has_rewards else 0
        )
        started |= {"address": "local", "num_cpus": needed, "include_dashboard": False}
    try:
        ray.init(logging_level="ERROR", **started)
    except (ConnectionError, ValueError) as error:
        raise _no_cluster(error) from error
    try:
        _check_gpus(ray, options, is_local=address is None)
        yield
    finally:
        ray.shutdown()


def _check_gpus(ray: Any, options: RayOptions, *, is_local: bool) -> None:
    """Refuse more GPUs than this machine has: Ray would wait for them without a word."""
    asked = options.policy_gpus * options.policy_workers
    asked += options.reward_gpus * options.reward_workers
    there = float(ray.cluster_resources().get("GPU", 0))
    if is_local and asked > there:
        raise ConfigError(
            f"the workers need {asked:g} GPUs and Ray sees {there:g} on this machine: lower "
            "num_workers, gpus_per_worker or gpus_per_reward_worker, or name a cluster "
            "(--ray_address)"
        )


def _cpus(options: RayOptions) -> int:
    """CPUs of a policy worker: on one machine without GPUs the workers share all of them."""
    if cluster_address(options) is not None or options.policy_gpus:
        return 1
    return max(1, (os.cpu_count() or 1) // options.policy_workers)


# ---- the round -----------------------------------------------------------------------------------


def make_round_on_ray(
    trainer: NEATTrainer, script: ScriptArguments, options: RayOptions, made_by: dict[str, Any]
) -> FinishedRound:
    """The first round, made by Ray's workers; the trainer's own model makes nothing of it.

    Ray has to be connected. `made_by` tells this run's model and options from others.
    """
    from neat_align.rounds.make_round import make_round
    from neat_align.rounds.params import RoundTools
    from neat_align.runs.events import stage_reporter
    from neat_align.trainer.round_maker import round_params

    parts = trainer.parts
    maker = parts.round_maker
    tools = RoundTools(maker.tokenizer, maker.bank, maker.rewards, _Elsewhere(), _Elsewhere())
    with stage_reporter(trainer.callback_handler.callbacks, "round 1") as progress:
        return make_round(
            maker.rows,
            num_groups=maker.num_groups,
            position=0,
            round_index=0,
            params=round_params(trainer.args),
            tools=tools,
            folder=parts.directory.round_folder(0).absolute(),
            progress=progress,
            slice_maker=_ray_shards(trainer, script, options, made_by),
            slice_prompts=options.shard_prompts,
        )


def _ray_shards(
    trainer: NEATTrainer, script: ScriptArguments, options: RayOptions, made_by: dict[str, Any]
) -> RayShards:
    from neat_align.rounds.ray_shards import RayShards, Workers
    from neat_align.trainer.round_maker import round_params

    parts = trainer.parts
    rewards = parts.scored_by.rewards
    where = "in the expansion; its finished answers and scores are kept"
    gpus, reward_gpus = options.policy_gpus, options.reward_gpus
    setup = WorkerSetup(script, config_values(trainer.args), tuple(parts.data.rows[:_LOOKED_AT]))
    policy = Workers(options.policy_workers, _cpus(options), gpus, setup.on(gpus).policy_tools)
    scoring = Workers(options.reward_workers, 1, reward_gpus, setup.on(reward_gpus).reward_tools)
    return RayShards(
        policy=policy,
        rewards=scoring if rewards else None,
        params=round_params(trainer.args),
        reward_names=tuple(reward.name for reward in rewards),
        made_by=made_by,
        check_stop=lambda: parts.ranks.raise_if_this_rank_must_stop(where),
    )


class _Elsewhere:
    """The sampler of a process that draws nothing itself."""

    def sample(self, *_: Any, **__: Any) -> Any:
        """Raises RuntimeError."""
        raise RuntimeError("completions are drawn by Ray's workers, not here")


# ---- a worker ------------------------------------------------------------------------------------


def config_values(config: NEATConfig) -> dict[str, Any]:
    """The options that the same configuration can be made from, in this process or a worker.

    Without a secret: workers of this machine have it in their environment, as this process has.
    """
    values = {f.name: getattr(config, f.name) for f in fields(config) if f.init}
    # transformers reads it as a mapping, and keeps it as an object.
    values["accelerator_config"] = cast("Any", config.accelerator_config).to_dict()
    return values | {"hub_token": None}


def on_the_cpu(config: NEATConfig) -> NEATConfig:
    """The same configuration, computing on the CPU."""
    return type(config)(**config_values(config) | {"use_cpu": True})


@dataclass(frozen=True)
class WorkerSetup:
    """What a worker makes its tools from. `rows` are the first of the data, for the checks that a
    trainer makes of its model: a worker's is laid out and sampled from as one process's would be.
    """

    script: ScriptArguments
    config: dict[str, Any]
    rows: tuple[PromptRow, ...]

    def on(self, gpus: float) -> WorkerSetup:
        """The setup of a worker with (part of) a GPU, or without one."""
        quiet = {"log_completions": False, "report_to": "none"}
        return replace(self, config=self.config | quiet | {"use_cpu": None if gpus else True})

    def policy_tools(self) -> RoundTools:
        """Who samples, and who gives log-probabilities: the policy is loaded here."""
        return self._trainer().parts.round_maker.start_tools()

    def reward_tools(self) -> RoundTools:
        """Who rewards. The policy is loaded only for `contrast`, which is its own opinion."""
        from transformers import TrainerState

        from neat_align.prompts.instruction_banks import load_bank
        from neat_align.prompts.skipped_rows import check_on_bad_row
        from neat_align.rounds.params import RoundTools
        from neat_align.trainer.reward_setup import named_rewards
        from neat_align.trainer.round_maker import aggregation

        if "contrast" in self.script.reward_funcs:
            return self.policy_tools()
        config = self._config()
        nobody = cast("Any", None)
        rewards = named_rewards(self.script.reward_funcs, config, nobody, config.reward_weights)
        return RoundTools(
            tokenizer=None,
            bank=load_bank(config.instruction_bank),
            rewards=tuple(replace(r, trainer_state=TrainerState) for r in rewards),
            sampler=_Elsewhere(),
            negative_sampler=_Elsewhere(),
            batch_size=config.generation_batch_size,
            on_bad_row=check_on_bad_row(config.on_bad_row),
            aggregation=aggregation(config),
        )

    def _trainer(self) -> NEATTrainer:
        from neat_align.pipeline import build_trainer

        config = self._config()
        return build_trainer(self.script, config, trains=False, data=(list(self.rows), []))

    def _config(self) -> NEATConfig:
        from neat_align.cli.console import quiet

        quiet()
        if self.config["use_cpu"]:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # reward models take a GPU that they see
        from neat_align.config import NEATConfig

        return NEATConfig(**self.config)
