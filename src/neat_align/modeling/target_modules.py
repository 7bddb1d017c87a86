"""The modules that an adapter is asked to be put on, looked for before peft does.

peft refuses only where it finds none of them: of a list with a misspelt name it trains the rest.
"""

from __future__ import annotations

from typing import Any

from neat_align.errors import ConfigError, did_you_mean


def check_target_modules(model: Any, peft_config: Any) -> None:
    """Raise ConfigError for a name in `target_modules` that no module of the model has.

    A name is a module's own, or the end of its path. One pattern in place of a list, `all-linear`,
    and adapters that are put on no modules are peft's to read.
    """
    asked = getattr(peft_config, "target_modules", None)
    if not isinstance(asked, list | tuple | set):
        return
    paths = [name for name, _ in model.named_modules() if name]
    for name in sorted(asked):
        if any(path == name or path.endswith(f".{name}") for path in paths):
            continue
        known = _named_layers(model)
        hint = did_you_mean(name, known)
        raise ConfigError(
            f"lora_target_modules (target_modules of peft_config) names {name!r}, and no module of "
            f"{type(model).__name__} is called so; {hint + ' Its' if hint else 'its'} layers are "
            f"{', '.join(known)}"
        )


def _named_layers(model: Any) -> list[str]:
    """The names of the layers with a matrix of weights, without their paths; each once."""
    names = [
        path.rpartition(".")[2]
        for path, module in model.named_modules()
        if any(p.ndim > 1 for p in module.parameters(recurse=False))
    ]
    return list(dict.fromkeys(names))
