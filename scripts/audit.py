"""Look the locked versions up among known vulnerabilities, with pip-audit: `make audit`.

Ends with 1 when there is one. pip-audit itself says "No known vulnerabilities found" where its
service cannot answer (a mirror of the package index often has no advisories), so the service is
first asked about a release that is known to be vulnerable. When it does not know that one, this
says so and ends with 0: an audit that could not be made is no failure, and must not look like a
pass.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LOCK = Path(__file__).resolve().parent.parent / "requirements.lock"
# A release that has had published advisories for years.
KNOWN = "requests==2.19.1"


def pip_audit(requirements: Path, *options: str) -> Mapping[str, Any] | str:
    """pip-audit's report on a file of pinned requirements, or why there is none."""
    command = [
        sys.executable,
        "-m",
        "pip_audit",
        "--requirement",
        str(requirements),
        "--disable-pip",
        *options,
    ]
    ran = subprocess.run(  # noqa: S603
        [*command, "--format", "json", "--progress-spinner", "off"],
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        report: Mapping[str, Any] = json.loads(ran.stdout)
    except ValueError:
        return f"pip-audit ended with {ran.returncode}: {ran.stderr.strip()[-1000:]}"
    return report


def why_unreachable(report: Mapping[str, Any] | str) -> str | None:
    """Why the advisory service is of no use, from a report on KNOWN.

    None when it knows its vulnerabilities.
    """
    if isinstance(report, str):
        return report
    (package,) = report["dependencies"]
    if package.get("vulns"):
        return None
    return (
        package.get("skip_reason")
        or f"the service lists no vulnerabilities of {KNOWN}, which has some"
    )


def verdict(report: Mapping[str, Any]) -> tuple[int, list[str]]:
    """Exit code, and lines to print, of pip-audit's report."""
    packages: Sequence[Mapping[str, Any]] = report["dependencies"]
    skipped = [f"{p['name']}: {p['skip_reason']}" for p in packages if "skip_reason" in p]
    found = [
        f"{p['name']} {p['version']}: {v['id']} ({', '.join(v['aliases'])}), fixed in "
        f"{', '.join(v['fix_versions']) or 'no release yet'}"
        for p in packages
        for v in p.get("vulns", ())
    ]
    looked_up = len(packages) - len(skipped)
    lines = [
        f"{looked_up} of {len(packages)} locked packages looked up, {len(found)} known "
        "vulnerabilities"
    ]
    return int(bool(found)), [
        *lines,
        *(f"  vulnerable: {line}" for line in found),
        *(f"  not looked up: {line}" for line in skipped),
    ]


def main() -> int:
    """Audit the lock file."""
    with tempfile.TemporaryDirectory() as folder:
        known = Path(folder) / "known.txt"
        known.write_text(f"{KNOWN}\n", encoding="utf-8")
        reason = why_unreachable(pip_audit(known, "--no-deps"))
    # The lock is complete and pinned by hash, so nothing has to be resolved or installed.
    report = pip_audit(LOCK) if reason is None else reason
    if isinstance(report, str):
        print(f"NOT AUDITED, the advisory service did not answer: {report}")
        print(
            "requirements.lock was not checked; run `make audit` where the service can be reached"
        )
        return 0
    code, lines = verdict(report)
    print("\n".join(lines))
    return code


if __name__ == "__main__":
    sys.exit(main())
