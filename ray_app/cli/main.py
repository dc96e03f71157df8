"""The command line. Parses, calls, prints; what it calls is imported inside the commands, so that help is instant.

Exit status: 0 all done, 1 some subject failed, 2 bad input or usage, 130 stopped by Ctrl-C.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from ray_app.cli.adapters import adapters
from ray_app.cli.caption import caption
from ray_app.cli.consent import audit, consent, subject
from ray_app.cli.detect import detect
from ray_app.cli.evaluate import evaluate
from ray_app.cli.keys import keys
from ray_app.cli.runs import cancel, logs, retry, status
from ray_app.cli.server import generate, serve
from ray_app.cli.shape import fuse, merge, resize, sweep
from ray_app.cli.storage import gc
from ray_app.cli.train import drive, train, validate
from ray_app.cli.tune import tune
from ray_app.cli.up import up
from ray_app.silence import silence
from training.errors import UserError


class Commands(click.Group):
    """A group whose UserErrors are one message and exit status 2."""

    def invoke(self, ctx: click.Context) -> Any:
        """Runs a command; errors that a user can mend are one line and exit status 2."""
        try:
            return super().invoke(ctx)
        except UserError as error:
            click.echo(f"dreamfleet: {error}", err=True)
            ctx.exit(2)
        except KeyboardInterrupt:
            ctx.exit(130)
        except Exception as error:
            if os.environ.get("DREAMFLEET_DEBUG") or not _is_ray(error):
                raise
            click.echo(
                f"dreamfleet: the Ray cluster was lost ({_first_line(error)}). Run the same command again.", err=True
            )
            ctx.exit(1)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "DREAMFLEET"})
@click.version_option(package_name="dreamfleet")
def main() -> None:
    """Submit a manifest of subjects, get one LoRA adapter each, generate with any of them over HTTP."""
    silence()


@main.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default="out/demo",
    show_default=True,
    help="folder for the report, the images and the storage",
)
def demo(out: Path) -> None:
    """Train the included subjects, serve them and generate images; writes OUT/report.html."""
    from ray_app.cli.demo import run_demo

    sys.exit(run_demo(out))


@main.command()
@click.argument("name", default="pocket")
@click.option("--hash", "hashed", is_flag=True, help="its hash instead: what `serve --serves` takes")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object on stdout")
def base(name: str, hashed: bool, as_json: bool) -> None:
    """Print the folder of the base NAME (default: pocket), for diffusers' from_pretrained."""
    from training.base.files.folder import find_base, hash_base

    folder = find_base(name)
    if as_json:
        click.echo(json.dumps({"base": name, "folder": str(folder), "hash": hash_base(folder)}))
    else:
        click.echo(hash_base(folder) if hashed else str(folder))


for command in (validate, train, drive, status, logs, cancel, retry, serve, generate, adapters, gc, evaluate, keys, up):
    main.add_command(command)
for command in (caption, detect, consent, subject, audit, tune):
    main.add_command(command)
for command in (merge, resize, fuse, sweep):
    adapters.add_command(command)


def _is_ray(error: Exception) -> bool:
    """Whether Ray itself failed; asked without importing Ray."""
    return any(kind.__module__.startswith("ray.") for kind in type(error).__mro__)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


if __name__ == "__main__":
    main()
