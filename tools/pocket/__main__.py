"""The command line: `python -m tools.pocket STAGE ...`; every stage takes up where it stopped."""

import argparse
import logging
from functools import partial
from pathlib import Path

from tools.pocket import bench, control, drawings, export, figures, judge, latents, pool, score, subjects, train, vae
from tools.pocket.dit import export as dit_export, pairs, train as dit_train
from tools.pocket.recipe import BASE, CONTROL, DIT, DOCS, UNET


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.pocket", description=__doc__)
    parser.add_argument("--images", type=int, help="train the UNet, or the transformer, until it has seen so many")
    parser.add_argument("--warm-start", action="store_true", help="without a snapshot, go on from the exported weights")
    parser.add_argument("--base", type=Path, default=BASE, help="the folder that `export` writes and `bench` reads")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where `bench` leaves its report")
    stages = {
        "fetch": drawings.fetch,
        "subjects": subjects.write,
        "data": pool.draw,
        "vae": vae.make,
        "latents": latents.make,
        "judge": judge.make,
        "unet": train.make,
        "cool": train.cool,
        "score": score.make,
        "export": export.make,
        "figures": figures.make,
        "bench": bench.make,
    }
    transformer = {
        "pairs": pairs.make,
        "dit": dit_train.make,
        "dit-cool": dit_train.cool,
        "dit-export": dit_export.make,
    }
    edges = {
        "control": control.make,
        "control-export": control.export,
        "control-figure": control.figure,
    }
    known = {**stages, **transformer, **edges}
    parser.add_argument(
        "stages",
        nargs="+",
        choices=[*known, "all"],
        metavar="STAGE",
        help=f"{', '.join(known)}; all: but those of the transformer and of the ControlNet",
    )
    arguments = parser.parse_args()
    known["unet"] = partial(train.make, images=arguments.images or UNET.images, warm=arguments.warm_start)
    known["dit"] = partial(dit_train.make, images=arguments.images or DIT.images)
    known["control"] = partial(control.make, images=arguments.images or CONTROL.images)
    known["vae"] = partial(vae.make, warm=arguments.warm_start)
    known["export"] = partial(export.make, folder=arguments.base)
    known["bench"] = partial(bench.make, base=arguments.base, docs=arguments.docs)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    for name in stages if "all" in arguments.stages else arguments.stages:
        known[name]()


if __name__ == "__main__":
    main()
