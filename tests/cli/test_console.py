"""The libraries of a run are imported without looking for garbage in them."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from neat_align.cli.console import importing


def told(code: str) -> list[str]:
    """What a process of its own prints, in which nothing is imported yet."""
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60
    )
    return done.stdout.splitlines()


def test_nothing_is_collected_while_libraries_are_imported_and_they_are_left_out_afterwards() -> (
    None
):
    code = (
        "import gc\n"
        "from neat_align.cli.console import importing\n"
        "with importing():\n"
        "    print(gc.isenabled(), gc.get_freeze_count())\n"
        "print(gc.isenabled(), gc.get_freeze_count() > 1000)\n"
        "gc.unfreeze()\n"
        "try:\n"
        "    with importing():\n"
        "        import no_such_module\n"
        "except ImportError:\n"
        "    print(gc.isenabled(), gc.get_freeze_count())\n"
        "gc.disable()\n"
        "with importing():\n"
        "    pass\n"
        "print(gc.isenabled(), gc.get_freeze_count())\n"
    )
    assert told(code) == ["False 0", "True True", "True 0", "False 0"]


def test_a_program_that_has_torch_already_keeps_its_garbage_collector_as_it_was() -> None:
    frozen = gc.get_freeze_count()
    with importing():
        assert gc.isenabled()
    assert (gc.isenabled(), gc.get_freeze_count()) == (True, frozen)


@pytest.mark.slow  # the imports of a run
def test_a_run_imports_its_libraries_so() -> None:
    code = (
        "import gc\n"
        "from neat_align.cli import main\n"
        "try:\n"
        "    main(['train', '--config', 'demo', '--no_such_option', '1'])\n"
        "except SystemExit as stopped:\n"
        "    print(stopped.code)\n"
        "print(gc.isenabled(), gc.get_freeze_count() > 100_000)\n"
    )
    assert told(code) == ["2", "True True"]
