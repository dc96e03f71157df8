"""What the README shows works: its manifest is valid, its commands exist, its links lead somewhere."""

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from ray_app.cli.main import main
from training.manifest.manifest import parse_manifest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_its_manifest_is_valid() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        assert parse_manifest(block).subjects


def test_its_commands_explain_themselves() -> None:
    named = set(re.findall(r"(?:^|`)dreamfleet ([a-z]+)", README, re.MULTILINE))
    assert {"demo", "validate", "train", "serve", "generate", "adapters", "base"} <= named
    for command in sorted(named):
        result = CliRunner().invoke(main, [command, "--help"])
        assert result.exit_code == 0, command
        assert "Usage:" in result.output


def test_its_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"make ([a-z-]+)", README + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")):
        assert f"\n{target}:" in makefile, target


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))])
def test_links_lead_somewhere(page: str) -> None:
    file = ROOT / page
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", file.read_text(encoding="utf-8")):
        if "://" not in link:
            assert (file.parent / link).exists(), f"{page}: {link}"
