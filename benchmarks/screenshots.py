"""Screenshots of reports in light, dark and on a phone: `python -m benchmarks.screenshots RUN [RUN ...] --output DIR`.

Headless Chromium makes them: the package `chromium` of Debian.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.harness.program import run_program
from newllm_jax.cli.options import Parser
from newllm_jax.errors import InputError

FORMS = {"light": (1200, True), "dark": (1200, False), "phone": (390, True)}  # width in pixels, whether it is light
NARROWEST = 500  # pixels of a window of Chromium; a phone is a frame in it


def main(argv: Sequence[str]) -> None:
    """Writes `RUN-light.png`, `RUN-dark.png` and `RUN-phone.png` of each run. Raises InputError."""
    parser = Parser(prog="python -m benchmarks.screenshots", description=__doc__, allow_abbrev=False)
    parser.add_argument("pages", nargs="+", type=Path, metavar="RUN", help="run directory, or an HTML file")
    parser.add_argument("--output", type=Path, default=Path("screenshots"), metavar="DIR", help="folder for them")
    parser.add_argument("--height", type=int, default=2400, help="of the part of a page that is shown, in pixels")
    arguments = parser.parse_all(argv)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for given in arguments.pages:
        page = given / "report.html" if given.is_dir() else given
        for form in FORMS:
            path = arguments.output / f"{given.stem}-{form}.png"
            save_screenshot(path, page, form, arguments.height)
            print(f"written to {path}")


def save_screenshot(path: Path, page: Path, form: str, height: int) -> None:
    """The top of a page as a PNG."""
    from PIL import Image

    width, is_light = FORMS[form]
    with tempfile.TemporaryDirectory() as folder:
        frame = Path(folder, "frame.html")
        frame.write_text(framed([page], width, height), encoding="utf-8")
        size = f"{max(width, NARROWEST)},{height}"
        chromium(frame, is_light, f"--screenshot={Path(folder, 'shot.png')}", f"--window-size={size}")
        with Image.open(Path(folder, "shot.png")) as shot:
            # 64 colours are enough for curves and text, and a third of the bytes.
            shot.crop((0, 0, width, height)).convert("RGB").quantize(64).save(path, optimize=True)


def framed(pages: Iterable[Path], width: int, height: int) -> str:
    """A page with a frame for each of some pages, which is their window."""
    frames = (
        f'<iframe src="{page.resolve().as_uri()}" style="border:0;display:block;width:{width}px;height:{height}px">'
        "</iframe>"
        for page in pages
    )
    return f'<!DOCTYPE html><body style="margin:0">{"".join(frames)}'


def chromium(page: Path, is_light: bool, *options: str) -> str:
    """What headless Chromium prints of a page. Raises InputError where there is none, or it fails."""
    program = shutil.which("chromium")
    if program is None:
        raise InputError("chromium: not on PATH; install the package of that name")
    words = [program, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
             f"--blink-settings=preferredColorScheme={int(is_light)}", *options, page.resolve().as_uri()]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise InputError(f"chromium: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(run_program(main))
