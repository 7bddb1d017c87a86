"""Picture of a run's report for the README: python scripts/readme_picture.py RUN_DIR

Writes the report anew and photographs its top in a headless Chromium, in light colours, to
docs/report.png.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

from neat_align.reporting.run_report import write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PICTURE = Path(__file__).resolve().parents[1] / "docs" / "report.png"
# CSS pixels; twice as many in the picture would be sharper, and four times as heavy.
WIDTH, HEIGHT = 1200, 900
SECONDS = 60


def main() -> None:
    """Photograph the report of the run directory on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--out", type=Path, default=PICTURE)
    arguments = parser.parse_args()
    photograph(write_report(arguments.run_dir), arguments.out)
    print(f"{arguments.out}: {arguments.out.stat().st_size / 1000:.0f} kB")


def photograph(page: Path, picture: Path) -> None:
    """The top of a page as a PNG; raises SystemExit without a browser or a picture."""
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        raise SystemExit(
            f"there is no browser on this machine: install one of {', '.join(BROWSERS)}"
        )
    picture.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as profile:
        command = [
            browser,
            "--headless",
            "--no-sandbox",  # the page is ours, and containers have no user namespaces
            "--disable-gpu",
            "--disable-background-networking",
            "--no-first-run",
            "--hide-scrollbars",
            "--blink-settings=preferredColorScheme=1",  # light, whatever the machine prefers
            f"--user-data-dir={profile}",
            f"--window-size={WIDTH},{HEIGHT}",
            f"--screenshot={picture.resolve()}",
            page.resolve().as_uri(),
        ]
        done = subprocess.run(  # noqa: S603
            command, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    if not picture.is_file():
        raise SystemExit(f"{browser} took no picture:\n{done.stderr}")


if __name__ == "__main__":
    main()
