"""`python -m benchmarks`: every benchmark, one after another, each writing its dated table beside its program."""

import subprocess
import sys
from pathlib import Path


def main() -> int:
    programs = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py"))
    failed = [
        name for name in programs if subprocess.run([sys.executable, "-m", f"benchmarks.{name}", "--write"]).returncode
    ]
    print(
        f"{len(programs) - len(failed)} of {len(programs)} benchmarks done" + (f"; failed: {failed}" if failed else "")
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
